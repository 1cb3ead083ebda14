"""The two rules of the house, checked from the imports: who may see whom, and what a served process may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [("errors", "settings", "artifact"), ("ir",), ("targets",), ("passes",),
          ("frontend", "lowering", "planning", "pipeline", "compile", "write", "progress", "commands", "cli", "flags",
           "opt", "opt_run", "plugins", "report", "inspect", "onnx")]
ORDER = {name: level for level, names in enumerate(LAYERS) for name in names}
HEAVY = ("torch", "triton", "tvm", "tvm_ffi", "transformers", "onnx", "networkx")


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(module, line, whether at import time) of every import in a file, TYPE_CHECKING blocks left out."""
    found: list[tuple[str, int, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, top) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it in full"
            found.append((node.module or "", node.lineno, top))
        inside = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


def sources(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


def room(path: Path) -> str:
    """The layer a file belongs to."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "qcn_compile" else parts[0]


COMPILER = sources("qcn_compile/ir", "qcn_compile/frontend", "qcn_compile/lowering", "qcn_compile/planning", "passes",
                   "targets")


@pytest.mark.parametrize("path", COMPILER + sorted((ROOT / "qcn_compile").glob("*.py")),
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_lower_layers_do_not_see_higher_ones(path: Path) -> None:
    own = ORDER.get(room(path))
    if own is None:  # qcn_compile/__init__.py: names loaded on first use
        return
    for module, line, _ in imports(path):
        parts = module.split(".")
        if parts[0] == "qcn_compile" and len(parts) > 1:
            seen = ORDER.get(parts[1])
            assert seen is not None and seen <= own, f"{path.name}:{line}: {room(path)} must not import {module}"


@pytest.mark.parametrize("path", sources("runtime"), ids=lambda p: str(p.relative_to(ROOT)))
def test_runtime_sees_only_the_lowest_layer(path: Path) -> None:
    for module, line, _ in imports(path):
        parts = module.split(".")
        assert parts[0] not in HEAVY, f"{path.name}:{line}: the runtime must not import {module}"
        if parts[0] == "qcn_compile" and len(parts) > 1:
            assert parts[1] in ("errors", "settings", "artifact", "runtime"), f"{path.name}:{line}: imports {module}"


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    modules = [".".join(("qcn_compile", *p.relative_to(ROOT).with_suffix("").parts)) for p in sources("runtime")]
    modules = [m.removesuffix(".__init__") for m in modules]
    code = ("import importlib, sys\n"
            f"for name in {modules!r}: importlib.import_module(name)\n"
            f"print([m for m in {HEAVY!r} if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, qcn_compile, qcn_compile.cli; print([m for m in {(*HEAVY, 'numpy')!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_every_pass_has_one_file_and_cases() -> None:
    from qcn_compile import pipeline
    from qcn_compile.passes.base import REGISTRY

    assert pipeline.default_passes()
    cases = {p.name.split(".")[0] for p in (ROOT / "tests/passes/qir").glob("*.qir")}
    for name, cls in REGISTRY.items():
        if cls.__module__.startswith("qcn_compile.passes."):
            assert cls.__module__ == f"qcn_compile.passes.{name.replace('-', '_')}"
            assert name in cases, f"pass {name} has no tests/passes/qir/{name}.*.qir"
