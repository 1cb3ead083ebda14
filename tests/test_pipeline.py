"""The pipeline as a tool: order checks, editing, tracing options, and the repro a failing pass leaves behind."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from qcn_compile.errors import PassError, UsageError
from qcn_compile.ir.graph import Graph
from qcn_compile.ir.text import parse_graph, print_graph
from qcn_compile.passes.base import REGISTRY, Pass, PassContext, register_pass
from qcn_compile.pipeline import Pipeline, Tracing, passes_by_name

TEXT = """graph @main(%x: f32[T,4], %y: f32[T,4]) {
  %1 : f32[T,4] = silu(%x)
  %2 : f32[T,4] = mul(%1, %y)
  %3 : f32[T,4] = exp(%x)
  return %2
}
"""


@dataclass(frozen=True)
class Breaks(Pass):
    """Leaves a graph that does not verify."""

    name: ClassVar[str] = "breaks"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        graph.ops.reverse()
        return graph


@pytest.fixture
def broken() -> type[Pass]:
    REGISTRY.pop("breaks", None)
    register_pass(Breaks)
    yield Breaks
    REGISTRY.pop("breaks", None)


def test_order_is_checked() -> None:
    pipeline = Pipeline(list(passes_by_name(["fuse-norm", "canonicalize"])))
    with pytest.raises(PassError, match="fuse-norm must run after canonicalize"):
        pipeline.run(parse_graph(TEXT), PassContext())


def test_the_input_is_never_changed() -> None:
    graph = parse_graph(TEXT)
    Pipeline(list(passes_by_name(["canonicalize", "fuse-epilogue"]))).run(graph, PassContext())
    assert print_graph(graph) == TEXT


def test_editing() -> None:
    names = lambda p: [item.name for item in p.passes]  # noqa: E731
    pipeline = Pipeline.default()
    before = names(pipeline)
    pipeline.insert(Breaks(), before="fuse-moe")
    assert names(pipeline).index("breaks") == before.index("fuse-moe")
    pipeline.remove("breaks").insert(Breaks(), after="canonicalize")
    assert names(pipeline) == [*before, "breaks"]
    pipeline.replace("select-quantization", format="int8")
    assert [p.format for p in pipeline.passes if p.name == "select-quantization"] == ["int8"]
    with pytest.raises(UsageError, match="no pass named 'nope' in the pipeline; it has canonicalize"):
        pipeline.remove("nope")
    pipeline.reorder("breaks", before="fuse-moe")
    assert names(pipeline).index("breaks") == before.index("fuse-moe") and len(pipeline.passes) == len(before) + 1
    assert names(pipeline.reorder("breaks"))[-1] == "breaks"
    pipeline.replace("fuse-moe", Breaks())
    assert names(pipeline)[before.index("fuse-moe")] == "breaks"
    with pytest.raises(UsageError, match="it runs more than once"):
        pipeline.reorder("breaks")
    with pytest.raises(UsageError, match="no pass named 'nope'"):
        pipeline.reorder("fuse-norm", after="nope")
    assert "fuse-norm" in names(pipeline)  # not lost on the way
    pipeline.reorder("fuse-norm", after="fuse-epilogue")
    with pytest.raises(PassError, match="must run after"):
        pipeline.reorder("fuse-deltanet", before="fuse-norm").reorder("select-quantization").reorder(
            "merge-linears", before="fuse-norm").check_order()


def test_defaults_follow_the_target() -> None:
    base = lambda target: next(p.base for p in Pipeline.default(target).passes if p.name == "select-quantization")  # noqa: E731
    assert (base("cpu"), base("null"), base("h100")) == ("f32", "f32", "bf16")
    with pytest.raises(UsageError, match="h1000"):
        Pipeline.default("h1000")


def test_the_stable_names() -> None:
    """What plugins and programs may rely on."""
    import qcn_compile as qcn

    for name in ("trace", "compile", "load", "Pipeline", "Graph", "Options", "Pass", "RulePass", "PassContext", "Rule",
                 "Rewriter", "register_pass", "register_op", "register_kernel"):
        assert name in qcn.__all__ and getattr(qcn, name).__doc__, name
    for owner, methods in {qcn.Pipeline: ("default", "insert", "replace", "remove", "reorder", "run"),
                           sys.modules["qcn_compile.runtime.loaded"].Model: ("generate", "logits", "step")}.items():
        assert all(getattr(owner, method).__doc__ for method in methods)
    assert (Path(qcn.__file__).parent / "py.typed").is_file()


def test_tracing_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracing = Tracing(verify=True, print_after=("fuse-epilogue",), dump_dir=tmp_path, stop_after="fuse-epilogue")
    pipeline = Pipeline(list(passes_by_name(["canonicalize", "fuse-epilogue", "select-rows"])))
    graph = pipeline.run(parse_graph(TEXT), PassContext(), tracing)
    assert [op.name for op in graph.ops] == ["silu_mul"]
    assert [(name, before, after) for name, _, before, after in tracing.times] == [
        ("canonicalize", 3, 2), ("fuse-epilogue", 2, 1)]
    assert "// after fuse-epilogue" in capsys.readouterr().out
    dumped = sorted(tmp_path.iterdir())
    assert [p.name for p in dumped] == ["main-00-traced.qir", "main-01-canonicalize.qir", "main-02-fuse-epilogue.qir"]
    assert dumped[0].read_text() == print_graph(parse_graph(TEXT)) and dumped[2].read_text() == print_graph(graph)


def test_a_failing_pass_leaves_its_input_and_the_command(tmp_path: Path, broken: type[Pass]) -> None:
    pipeline = Pipeline(list(passes_by_name(["canonicalize", "breaks"])))
    with pytest.raises(PassError) as error:
        pipeline.run(parse_graph(TEXT), PassContext(), Tracing(verify=True, dump_dir=tmp_path))
    saved = tmp_path / "failed-02-breaks.qir"
    assert parse_graph(saved.read_text())
    assert f"-m qcn_compile.opt {saved} -p breaks" in str(error.value)
    assert "used before it is defined" in str(error.value)


def test_opt_command(tmp_path: Path) -> None:
    (tmp_path / "in.qir").write_text(TEXT)
    run = subprocess.run([sys.executable, "-m", "qcn_compile.opt", str(tmp_path / "in.qir"), "-p",
                          "canonicalize,fuse-epilogue", "--log"], capture_output=True, text=True, check=True)
    assert "silu_mul(%x, %y)" in run.stdout
    assert "// fuse-epilogue: silu_mul at %2: fired" in run.stdout
    bad = subprocess.run([sys.executable, "-m", "qcn_compile.opt", str(tmp_path / "none.qir")], capture_output=True,
                         text=True, check=False)
    assert bad.returncode == 2
    assert "cannot read" in bad.stderr


def test_custom_passes_register_once(broken: type[Pass]) -> None:
    with pytest.raises(PassError, match="registered already"):
        @register_pass
        @dataclass(frozen=True)
        class Again(Pass):
            name: ClassVar[str] = "breaks"
    with pytest.raises(PassError, match="needs a class attribute `name`"):
        register_pass(Pass)
