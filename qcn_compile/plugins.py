"""Plugins: a user's passes, ops and kernels, from `--plugin FILE.py` or the entry point group `qcn_compile.plugins`.

A plugin is a module. Importing it registers what it brings (`@register_pass`, `@register_op`, `@register_kernel`); when
it has a function `configure(pipeline) -> None`, that is called for every build with the pipeline it may change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from qcn_compile.errors import PassError, UsageError
from qcn_compile.ir.graph import Op
from qcn_compile.targets.files import describe, home, import_file, line_of

if TYPE_CHECKING:
    from qcn_compile.pipeline import Pipeline

__all__ = ["Plugin", "describe", "home", "load_plugins", "op_at"]
GROUP = "qcn_compile.plugins"


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
            raise PassError(f"{what}{line_of(error, self.path)}: {describe(error)}") from error


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
        raise UsageError(f"plugin {point.name} ({point.value}) failed to load{line_of(error)}: {describe(error)}; "
                         "repair or uninstall its package") from error
    path = Path(getattr(module, "__file__", "") or "")
    return Plugin(point.name, str(path), _digest(path), module)


def _from_file(path: Path) -> Plugin:
    if not path.is_file():
        raise UsageError(f"--plugin {path}: no such file; give a Python file")
    try:
        module = import_file(path)
    except ImportError as error:
        raise UsageError(f"--plugin {path}: {error}" if path.suffix != ".py" else _failed(path, error)) from error
    except Exception as error:
        raise UsageError(_failed(path, error)) from error
    return Plugin(path.stem, str(path), _digest(path), module)


def _failed(path: Path, error: Exception) -> str:
    return f"plugin {path} failed to load{line_of(error, str(path))}: {describe(error)}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


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
