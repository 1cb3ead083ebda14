"""What the tests of a run make once: the bundled model's trace (per process), object code of equal kernels (per run).

Both are what the compiler made, not stand-ins: passes work on copies of a graph, and the key of an object file is the
whole text of its kernel and the processor. `nothing_shared` is for tests of repeatability.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from qcn_compile.targets.tvm import emit

write_object = emit.write_object


def traced(source: Any, dtype: Any = None, made_up_head: bool = False) -> Any:
    """`trace_model`, but the bundled model's trace is kept, whatever name leads to it."""
    from qcn_compile.frontend.checkpoint import Located, locate
    from qcn_compile.frontend.model import trace_model
    from qcn_compile.ir.types import DType

    bundled, rest = locate(None, "cpu"), (dtype or DType.f32, made_up_head)
    if isinstance(source, Located) and source.path is not None and source.path.resolve() == bundled.path:
        return replace(kept(bundled, *rest), name=source.name)
    return trace_model(source, *rest)


@cache
def kept(*arguments: Any) -> Any:
    """The trace that is kept."""
    from qcn_compile.frontend.model import trace_model

    return trace_model(*arguments)


@contextmanager
def one_trace() -> Iterator[None]:
    """For as long as this lasts, builds and ONNX exports take the bundled model's trace from here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("qcn_compile.compile", "qcn_compile.onnx.emit"):
            import_module(name)
            patch.setattr(sys.modules[name], "trace_model", traced)
        yield


def share_objects(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Kernels compiled once in `folder`."""
    folder.mkdir(exist_ok=True)

    def write(function: Any, chip: Any, file: Path) -> None:
        key = sha256(f"{function.script()} {chip}".encode()).hexdigest()
        stored = folder / f"{key}.o"
        if not stored.is_file():
            part = folder / f"{key}.{os.getpid()}"
            write_object(function, chip, part.with_suffix(".o"))
            part.with_suffix(".o").rename(stored)
        shutil.copyfile(stored, file)

    patch.setattr(emit, "write_object", write)
