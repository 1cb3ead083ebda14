"""Python files of plugins: imported once a process; which file a thing is from; where in it an error was raised."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from qcn_compile.errors import QcnError
from qcn_compile.ir.optable import TABLE


def import_file(path: str | Path) -> ModuleType:
    """The module made from a file: imported once a process, found again when it is the running script.

    Raises what the file raises, ImportError when its name does not end in .py.
    """
    file = Path(path)
    for module in list(sys.modules.values()):
        known = getattr(module, "__file__", None)
        if isinstance(known, str) and Path(known).name == file.name and Path(known).resolve() == file.resolve():
            return module
    name = f"qcn_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def home(thing: Any) -> str:
    """The file that defines a class or function; "" when it is one of ours."""
    name = str(getattr(thing, "__module__", ""))
    if name.startswith("qcn_compile."):
        return ""
    return str(getattr(sys.modules.get(name), "__file__", "") or name)


def kernel_for(op_name: str, target: str, known: Iterable[str]) -> str:
    """What to do about an op without a kernel: its plugin gives it one, or it becomes ops that have one."""
    plugin = home(TABLE[op_name].reference) if op_name in TABLE else ""
    if plugin:
        return f"its plugin {plugin} can give it one with @qcn_compile.register_kernel({op_name!r}, target={target!r})"
    return "rewrite it into ops that have one: " + ", ".join(sorted(known))


def describe(error: Exception) -> str:
    """Type and text of an error; our own errors are messages already."""
    return str(error) if isinstance(error, QcnError) else f"{type(error).__name__}: {error}"


def line_of(error: Exception, file: str = "") -> str:
    """Where an error was raised, in `file` when it passed through it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    own = [f for f in frames if Path(f.filename) == Path(file).resolve()] or frames
    if isinstance(error, QcnError) or not own or own[-1].filename == __file__:
        return ""
    return f" at line {own[-1].lineno} of {Path(own[-1].filename).name}"
