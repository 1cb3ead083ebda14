"""qcn-opt: interpreting, reducing, plugins, and the round trip of every stage of a build."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcn_compile as qcn
from qcn_compile import opt
from qcn_compile.frontend.checkpoint import _ASSETS, load_config, locate
from qcn_compile.ir.graph import Graph
from qcn_compile.ir.reduce import reduce_graph
from qcn_compile.ir.text import parse_graph
from qcn_compile.passes.base import REGISTRY, PassContext
from qcn_compile.pipeline import Pipeline, Tracing
from tests import sharing


def bundled() -> Graph:
    return sharing.traced(locate(None, "cpu")).main


PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar
import qcn_compile as qcn

@qcn.register_pass
@dataclass(frozen=True)
class NoExp(qcn.Pass):
    name: ClassVar[str] = "no-exp"

    def run(self, graph, context):
        for op in graph.ops:
            if op.name == "exp":
                raise ZeroDivisionError("exp is too much for me")
        return graph

@qcn.register_pass
@dataclass(frozen=True)
class Wrong(qcn.RulePass):
    name: ClassVar[str] = "wrong"
    rules: ClassVar = [qcn.Rule("wrong", "silu(x) => sigmoid(x)")]
'''
TEXT = """graph @main(%x: f32[T,4], %y: f32[T,4]) {
  %1 : f32[T,4] = silu(%x)
  %2 : f32[T,4] = mul(%1, %y)
  %3 : f32[T,4] = exp(%2)
  %4 : f32[T,4] = neg(%3)
  %5 : f32[T,4] = add(%4, %1)
  return %5, %2
}
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "in.qir").write_text(TEXT)
    (tmp_path / "mine.py").write_text(PLUGIN)
    yield str(tmp_path / "in.qir"), str(tmp_path / "mine.py")
    REGISTRY.pop("no-exp", None)
    REGISTRY.pop("wrong", None)


def test_a_failure_names_plugin_pass_and_op(files: tuple[str, str], capsys: pytest.CaptureFixture[str],
                                            tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert opt.main([files[0], "-p", "no-exp", "--plugin", files[1]]) == 5
    error = capsys.readouterr().err
    assert "pass no-exp of plugin" in error
    assert "mine.py failed: ZeroDivisionError: exp is too much for me" in error
    assert "%3 : f32[T,4] = exp(%2)" in error
    assert f"-p no-exp --plugin {files[1]}" in error


def test_reduce_keeps_the_failing_op(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert opt.main([files[0], "-p", "no-exp", "--plugin", files[1], "--reduce"]) == 0
    out = capsys.readouterr().out
    assert "// reduced from 5 to 1 ops; still: ZeroDivisionError: exp is too much for me" in out
    assert [op.name for op in parse_graph(out).ops] == ["exp"]
    assert opt.main([files[0], "-p", "canonicalize", "--reduce"]) == 2
    assert "nothing to reduce: the passes canonicalize work" in capsys.readouterr().err


def test_reduce_finds_wrong_numbers(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert opt.main([files[0], "-p", "wrong", "--plugin", files[1], "--reduce", "--interpret"]) == 0
    out = capsys.readouterr().out
    assert "still: the numbers differ" in out
    assert [op.name for op in parse_graph(out).ops] == ["silu"]


def test_interpret(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert opt.main([files[0], "-p", "canonicalize,fuse-epilogue", "--interpret"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "f32[T,4] [8, 4]: norm" in lines[0]
    assert all(float(line.rpartition(" ")[2]) < 1e-6 for line in lines)
    assert opt.main([files[0], "-p", "wrong", "--plugin", files[1], "--interpret"]) == 0
    assert float(capsys.readouterr().out.splitlines()[0].rpartition(" ")[2]) > 0.1


def test_reduced_graph_of_a_whole_model_is_small(files: tuple[str, str]) -> None:
    """A failure deep inside the model: found without running every op away one by one."""
    calls = 0

    def fails(graph: Graph) -> str | None:
        nonlocal calls
        calls += 1
        return "router" if any(op.name == "topk" and ".5." in op.loc.module for op in graph.ops) else None

    small = reduce_graph(bundled(), fails)
    assert [op.name for op in small.ops] == ["topk"]
    assert calls < 60


@pytest.mark.parametrize("which", ["bundled", "qwen3-coder-next"])
def test_every_stage_round_trips(which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What --dump-dir writes goes through the command, which parses, verifies and prints it: the same text."""
    graph = bundled() if which == "bundled" else qcn.trace(load_config(_ASSETS / which)[0], "bf16")
    quant = "int4" if which == "bundled" else "fp8"
    pipeline = Pipeline.default(base="bf16", quant=quant)
    pipeline.run(graph, PassContext(), Tracing(dump_dir=tmp_path))
    stages = sorted(tmp_path.iterdir())
    assert [s.stem.split("-", 2)[2] for s in stages] == ["traced", *(p.name for p in pipeline.passes)]
    for stage in stages:
        assert opt.main([str(stage), "--verify"]) == 0
        assert capsys.readouterr().out == stage.read_text(), stage.name


def test_the_command_of_the_docs(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.qir"
    assert opt.main([files[0], "-p", "canonicalize,fuse-norm", "--verify"]) == 0
    printed = capsys.readouterr().out
    assert opt.main([files[0], "-p", "canonicalize,fuse-norm", "--verify", "-o", str(out)]) == 0
    assert (capsys.readouterr().out, out.read_text()) == ("", printed)
    assert opt.main([files[0], "-o", str(tmp_path / "no" / "where.qir")]) == 2
    assert "cannot write" in capsys.readouterr().err
