"""qcn-compile: an ahead-of-time compiler and a lean runtime for the Qwen3-Next model family.

Nothing heavy is imported here; names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcn_compile.compile import Options, compile
    from qcn_compile.ir.optable import op as register_op
    from qcn_compile.passes.base import Pass, PassContext, register_pass
    from qcn_compile.pipeline import Pipeline
    from qcn_compile.runtime.loaded import load

__version__ = "0.1.0"

_PLACES = {
    "compile": "qcn_compile.compile",
    "Options": "qcn_compile.compile",
    "load": "qcn_compile.runtime.loaded",
    "Pipeline": "qcn_compile.pipeline",
    "Pass": "qcn_compile.passes.base",
    "PassContext": "qcn_compile.passes.base",
    "register_pass": "qcn_compile.passes.base",
    "register_op": "qcn_compile.ir.optable",
}
__all__ = ["Options", "Pass", "PassContext", "Pipeline", "compile", "load", "register_op", "register_pass"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'qcn_compile' has no attribute {name!r}; it has {', '.join(sorted(_PLACES))}")
    module = import_module(_PLACES[name])
    value = getattr(module, "op" if name == "register_op" else name)
    globals()[name] = value  # also hides the submodule of the same name (qcn_compile.compile)
    return value
