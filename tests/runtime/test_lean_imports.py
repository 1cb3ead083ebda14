"""The runtime stays lean: what it imports, and what importing it leaves unloaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qcn_compile.runtime

FOLDER = Path(qcn_compile.runtime.__file__).parent
FILES = sorted(FOLDER.glob("*.py"))  # the core; the server in its own folder has packages of its own
HEAVY = ("torch", "triton", "tvm", "tvm_ffi", "transformers", "onnx", "networkx", "jinja2", "tokenizers")
OWN = ("qcn_compile.errors", "qcn_compile.settings", "qcn_compile.artifact", "qcn_compile.runtime")
OTHERS = {"numpy", "tokenizers", "jinja2", *sys.stdlib_module_names}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module == "qcn_compile" else [node.module]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_imports_only_what_it_may(path):
    for name in imported(path):
        if name.split(".")[0] == "qcn_compile":
            assert name.startswith(OWN), f"{path.name} imports {name}"
        else:
            assert name.split(".")[0] in OTHERS, f"{path.name} imports {name}"


def test_importing_everything_leaves_the_heavy_modules_unloaded():
    parts = [path.relative_to(FOLDER).with_suffix("").parts for path in FILES if path.stem != "__init__"]
    modules = [".".join(("qcn_compile.runtime", *names)) for names in parts]
    code = (f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\n"
            f"print([m for m in {HEAVY!r} if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_files_and_functions_stay_short():
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 300, path.name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and path.name != "cli.py":
                assert node.end_lineno - node.lineno < 46, f"{path.name}: {node.name}"
