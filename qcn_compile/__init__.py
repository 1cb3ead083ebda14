"""qcn-compile: an ahead-of-time compiler and a lean runtime for the Qwen3-Next model family.

Nothing heavy is imported here; names are loaded on first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcn_compile.compile import Options, compile, trace
    from qcn_compile.ir.graph import Graph
    from qcn_compile.ir.optable import op as register_op
    from qcn_compile.ir.rewrite import Rewriter, Rule
    from qcn_compile.passes.base import Pass, PassContext, RulePass, register_pass
    from qcn_compile.pipeline import Pipeline
    from qcn_compile.runtime.loaded import load
    from qcn_compile.targets.custom import register_kernel

__version__ = "0.1.0"

_PLACES = {
    "compile": "qcn_compile.compile",
    "Options": "qcn_compile.compile",
    "trace": "qcn_compile.compile",
    "Graph": "qcn_compile.ir.graph",
    "Rule": "qcn_compile.ir.rewrite",
    "Rewriter": "qcn_compile.ir.rewrite",
    "RulePass": "qcn_compile.passes.base",
    "register_kernel": "qcn_compile.targets.custom",
    "load": "qcn_compile.runtime.loaded",
    "Pipeline": "qcn_compile.pipeline",
    "Pass": "qcn_compile.passes.base",
    "PassContext": "qcn_compile.passes.base",
    "register_pass": "qcn_compile.passes.base",
    "register_op": "qcn_compile.ir.optable",
}
__all__ = ["Graph", "Options", "Pass", "PassContext", "Pipeline", "Rewriter", "Rule", "RulePass", "compile", "load",
           "register_kernel", "register_op", "register_pass", "trace"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'qcn_compile' has no attribute {name!r}; it has {', '.join(sorted(_PLACES))}")
    module = import_module(_PLACES[name])
    value = getattr(module, "op" if name == "register_op" else name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps `qcn_compile.compile` the function: importing the submodule of that name would put itself there."""

    def __setattr__(self, name: str, value: Any) -> None:
        same = name == "compile" and isinstance(value, ModuleType)
        super().__setattr__(name, value.compile if same else value)


sys.modules[__name__].__class__ = _Package
