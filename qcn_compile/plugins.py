"""Plugins: a user's passes, ops and kernels, from `--plugin FILE.py` or the entry point group `qcn_compile.plugins`.

A plugin is a module. Importing it registers what it brings (`@register_pass`, `@register_op`, `@register_kernel`); when
it has a function `configure(pipeline) -> None`, that is called for every build with the pipeline it may change.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from qcn_compile.errors import LoweringError, PassError, QcnError, UsageError
from qcn_compile.ir.graph import Op
from qcn_compile.ir.text import format_op
from qcn_compile.targets.base import Call
from qcn_compile.targets.tvm.lowering import LOWERINGS
from qcn_compile.targets.tvm.lowering.site import COUNTS, Site, call, inner, result

if TYPE_CHECKING:
    from qcn_compile.pipeline import Pipeline

GROUP = "qcn_compile.plugins"
Lowering = Callable[[Site], list[Call]]


@dataclass(frozen=True)
class Plugin:
    """A loaded plugin: where it came from, the hash of its source, and its module."""

    name: str
    path: str
    sha256: str
    module: ModuleType

    def configure(self, pipeline: Pipeline) -> None:
        """Let the plugin change the pipeline. Raises PassError naming the plugin."""
        hook = getattr(self.module, "configure", None)
        if hook is None:
            return
        try:
            hook(pipeline)
        except Exception as error:
            what = f"plugin {self.path}: configure(pipeline) failed"
            raise PassError(f"{what}{_line(error, self.path)}: {describe(error)}") from error


def load_plugins(files: Iterable[str | Path] = (), installed: bool = True) -> list[Plugin]:
    """Installed plugins (entry points), then files, each imported once per process.

    Raises UsageError naming the plugin and the line that failed.
    """
    found = [_installed(point) for point in entry_points(group=GROUP)] if installed else []
    return found + [_from_file(Path(file)) for file in files]


def _installed(point: Any) -> Plugin:
    try:
        module = point.load()
    except Exception as error:
        raise UsageError(f"plugin {point.name} ({point.value}) failed to load{_line(error)}: {describe(error)}; "
                         "repair or uninstall its package") from error
    path = Path(getattr(module, "__file__", "") or "")
    return Plugin(point.name, str(path), _digest(path), module)


def _from_file(path: Path) -> Plugin:
    if not path.is_file():
        raise UsageError(f"--plugin {path}: no such file; give a Python file")
    name, digest = f"qcn_plugin_{path.stem}", _digest(path)
    known = _loaded(path)
    if known is not None:
        return Plugin(path.stem, str(path), digest, known)
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise UsageError(f"--plugin {path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"plugin {path} failed to load{_line(error, str(path))}: {describe(error)}") from error
    return Plugin(path.stem, str(path), digest, module)


def _loaded(path: Path) -> ModuleType | None:
    """The module made from a file already, be it the running script."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and Path(file).name == path.name and Path(file).resolve() == path.resolve():
            return module
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def register_kernel(op_name: str, target: str = "cpu", lower: Lowering | None = None) -> Callable[..., Any]:
    """Register the decorated function as the kernel source of an op, in place of a built-in one if there is one.

    The function is called as `f(symbol, machine, **params)` and returns a `Function` (`targets/tvm/kernels/core.py`), a
    TVM PrimFunc, or TVMScript source as text. `lower(site)` gives the launches, whose kernel family must be
    `custom_<op_name>`; without it the op is lowered row by row, see `row_by_row`.
    """
    if target != "cpu":
        raise UsageError(f"register_kernel({op_name!r}, target={target!r}): only the CPU target takes custom kernels")

    def register(source: Callable[..., Any]) -> Callable[..., Any]:
        LOWERINGS[op_name] = _Custom(op_name, source, lower or row_by_row)
        return source

    return register


def family_of(op_name: str) -> str:
    """Kernel family of a custom kernel."""
    return f"custom_{op_name}"


def row_by_row(site: Site) -> list[Call]:
    """One launch over the rows of the first result: arguments are operands, results, counts.

    Parameters: rows, times (see `kernels.loops.count`), width of a result row, threads, the distance between rows of
    operand i as `stride_i` (0: dense), and every plain attribute of the op.
    """
    shape = site.results[0].shape
    strides = {f"stride_{i}": site.stride(i) for i in range(len(site.operands)) if site.has(i)}
    attrs = {key: value for key, value in site.op.attrs.items() if isinstance(value, int | float | str | bool)}
    refs = [site.ref(i) for i in range(len(site.operands)) if site.has(i)]
    refs += [result(i) for i in range(len(site.results))]
    return [call(family_of(site.op.name), [*refs, COUNTS], **site.rows(shape), width=inner(shape),
                 threads=not site.decode, **strides, **attrs)]


@dataclass(frozen=True)
class _Custom:
    """A lowering that makes its kernel family known when it is first used (only then TVM is imported)."""

    op_name: str
    source: Callable[..., Any]
    lower: Lowering

    def __call__(self, site: Site) -> list[Call]:
        from qcn_compile.targets.tvm.kernels import FAMILIES

        FAMILIES[family_of(self.op_name)] = self.make
        try:
            return self.lower(site)
        except QcnError:
            raise
        except Exception as error:
            raise self.failed("its lowering", error, format_op(site.op)) from error

    def make(self, symbol: str, machine: Any, **params: Any) -> Any:
        """The kernel, in the shape that `kernels.source` wants: something with a `.result`."""
        try:
            made = self.source(symbol, machine, **params)
            return made if hasattr(made, "result") else _Made(_prim_func(made, symbol))
        except Exception as error:
            raise self.failed("the source of its kernel", error, symbol) from error

    def failed(self, what: str, error: Exception, where: str) -> LoweringError:
        """The error to raise: plugin file, op, cause."""
        return LoweringError(f"op {self.op_name}: {what} ({self.source.__name__} in {home(self.source)}) "
                             f"failed{_line(error, home(self.source))}: {describe(error)}\n  at {where}")


@dataclass(frozen=True)
class _Made:
    result: Any


def _prim_func(made: Any, symbol: str) -> Any:
    if isinstance(made, str):
        from tvm.script import from_source

        made = from_source(made)
    if not hasattr(made, "with_attr"):
        raise TypeError(f"a kernel is a Function, a PrimFunc or TVMScript text, not a {type(made).__name__}")
    return made.with_attr("global_symbol", symbol)


def home(thing: Any) -> str:
    """The file that defines a class or function; "" when it is one of ours."""
    name = str(getattr(thing, "__module__", ""))
    if name.startswith("qcn_compile."):
        return ""
    return str(getattr(sys.modules.get(name), "__file__", "") or name)


def describe(error: Exception) -> str:
    """Type and text of an error; our own errors are messages already."""
    return str(error) if isinstance(error, QcnError) else f"{type(error).__name__}: {error}"


def _line(error: Exception, file: str = "") -> str:
    """Where an error was raised, in `file` when it passed through it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    own = [f for f in frames if Path(f.filename) == Path(file).resolve()] or frames
    if isinstance(error, QcnError) or not own or own[-1].filename == __file__:
        return ""
    return f" at line {own[-1].lineno} of {Path(own[-1].filename).name}"


def op_at(error: Exception) -> Op | None:
    """The op a failing pass was looking at: the nearest one among the variables of the frames of the error."""
    frames: list[TracebackType] = []
    step = error.__traceback__
    while step is not None:
        frames.append(step)
        step = step.tb_next
    for frame in reversed(frames):
        for value in frame.tb_frame.f_locals.values():
            if isinstance(value, Op):
                return value
    return None
