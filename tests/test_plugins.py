"""Plugins: loading, the configure hook, custom ops and kernels, and errors that say where they come from."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcn_compile as qcn
from qcn_compile.errors import IRError, LoweringError, PassError, UsageError
from qcn_compile.ir.graph import Op
from qcn_compile.ir.optable import TABLE
from qcn_compile.ir.rewrite import rewrite
from qcn_compile.ir.text import parse_graph
from qcn_compile.plugins import load_plugins
from qcn_compile.targets.base import Bucket, Operand
from qcn_compile.targets.cpu import CpuTarget
from qcn_compile.targets.tvm.lowering import LOWERINGS

OP = '''
import qcn_compile as qcn
from qcn_compile.ir.optable import same
from qcn_compile.targets.tvm.kernels.core import Function
from qcn_compile.targets.tvm.kernels.loops import count, each, sweep

@qcn.register_op("twice", "x", infer=same())
def twice(x):
    "2 x."
    return 2 * x

@qcn.register_kernel("twice")
def kernel(symbol, m, *, rows, times, width, stride_0, threads):
    f = Function(symbol, x="float32", y="float32", counts="int32")
    with f as a, each("t", count(a, rows, times), threads) as t:
        def body(i, n):
            x = a.x[t * (stride_0 or width) + i, n]
            a.y[t * width + i, n] = x + x
        sweep(width, m.lanes, body)
    return f
'''
TEXT = """graph @main(%x: f32[T,12]) {
  %1 : f32[T,12] = twice(%x)  ; model.layers.0 (here.py:1)
  return %1
}
"""


@pytest.fixture(autouse=True)
def forget() -> None:
    yield
    TABLE.pop("twice", None)
    LOWERINGS.pop("twice", None)


def plugin(folder: Path, text: str, name: str = "mine.py") -> Path:
    (folder / name).write_text(text)
    return folder / name


def launches(op: Op) -> list[qcn.Graph]:
    types = [v.tensor for v in op.inputs]
    return CpuTarget("x86-64-v3").lower(op, [Operand(t) for t in types], [v.tensor for v in op.results],
                                        Bucket("decode-1", 1, 1, 1))


def test_a_custom_op_is_lowered_and_compiled(tmp_path: Path) -> None:
    load_plugins([plugin(tmp_path, OP)], installed=False)
    (call,) = launches(parse_graph(TEXT).ops[0])
    assert call.kernel.family == "custom_twice"
    files = CpuTarget("x86-64-v3").emit([call.kernel], tmp_path / "kernels")
    assert files == ["libqcnhost.so", "libkernels.so"]
    assert (tmp_path / "kernels/source" / f"{call.kernel.symbol}.py").is_file()


def test_tvmscript_text_is_a_kernel_too(tmp_path: Path) -> None:
    load_plugins([plugin(tmp_path, OP)], installed=False)
    (call,) = launches(parse_graph(TEXT).ops[0])
    CpuTarget("x86-64-v3").emit([call.kernel], tmp_path / "a")
    text = (tmp_path / "a/source" / f"{call.kernel.symbol}.py").read_text()
    LOWERINGS.pop("twice")
    qcn.register_kernel("twice")(lambda symbol, m, **params: text)
    (call,) = launches(parse_graph(TEXT).ops[0])
    CpuTarget("x86-64-v3").emit([call.kernel], tmp_path / "b")
    assert (tmp_path / "b/source" / f"{call.kernel.symbol}.py").read_text() == text


def test_a_failing_kernel_names_file_and_op(tmp_path: Path) -> None:
    load_plugins([plugin(tmp_path, OP.replace("x + x", "x + undefined"), "bad.py")], installed=False)
    (call,) = launches(parse_graph(TEXT).ops[0])
    with pytest.raises(LoweringError, match=r"op twice: the source of its kernel \(kernel in .*bad.py\) failed at line "
                                            r"\d+ of bad.py: NameError"):
        CpuTarget("x86-64-v3").emit([call.kernel], tmp_path / "kernels")


def test_an_op_without_a_kernel_names_the_plugin_and_the_cure(tmp_path: Path) -> None:
    load_plugins([plugin(tmp_path, OP.partition("@qcn.register_kernel")[0], "bare.py")], installed=False)
    with pytest.raises(LoweringError, match=r"twice at model.layers.0 .*no kernel for it; its plugin .*bare\.py can "
                                            r"give it one with @qcn_compile.register_kernel\('twice', target='cpu'\)"):
        launches(parse_graph(TEXT).ops[0])


@pytest.mark.parametrize("equation", ["twixe(x) => neg(x)", "neg(x) => twixe(x)", "neg(x) => neg(exp(twixe(x)))"])
def test_a_rule_with_an_op_that_nobody_registered(equation: str) -> None:
    """Whether or not it would fire: a typing error on the left never would."""
    graph = parse_graph("graph @main(%x: f32[T,12]) {\n  return %x\n}\n")
    with pytest.raises(IRError, match=r"rule doubled \(.*\): no op named 'twixe'"):
        rewrite(graph, [qcn.Rule("doubled", equation)])


def test_loading_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.py: no such file"):
        load_plugins([tmp_path / "nowhere.py"])
    with pytest.raises(UsageError, match=r"plugin .*broken.py failed to load at line 2 of broken.py: ZeroDiv"):
        load_plugins([plugin(tmp_path, "x = 1\nx / 0\n", "broken.py")])


def test_configure_changes_the_pipeline(tmp_path: Path) -> None:
    file = plugin(tmp_path, "def configure(pipeline):\n    pipeline.remove('fuse-moe')\n", "hook.py")
    (loaded,) = load_plugins([file], installed=False)
    pipeline = qcn.Pipeline.default()
    loaded.configure(pipeline)
    assert "fuse-moe" not in [p.name for p in pipeline.passes]
    with pytest.raises(PassError, match=r"plugin .*hook.py: configure\(pipeline\) failed: no pass named 'fuse-moe'"):
        loaded.configure(pipeline)


def test_installed_plugins_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qcn_compile.plugins]\ntoy = qcn_toy_plugin\n")
    plugin(tmp_path, "def configure(pipeline):\n    pass\n", "qcn_toy_plugin.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "toy" in [p.name for p in load_plugins()]


def test_a_file_is_loaded_once(tmp_path: Path) -> None:
    file = plugin(tmp_path, OP, "once.py")
    assert load_plugins([file], installed=False)[0].module is load_plugins([file], installed=False)[0].module


def test_compile_stays_a_function_whatever_was_imported_first() -> None:
    import qcn_compile.compile  # noqa: F401

    assert callable(qcn.compile)
    assert callable(qcn.trace)
