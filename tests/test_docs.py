"""The documentation runs: python blocks and qcn-* commands; generated pages are current; links resolve."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import qcn_compile.compile  # noqa: F401
from qcn_compile import cli, opt
from qcn_compile.inspect import cli as inspect_cli
from qcn_compile.runtime import cli as run_cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"(?:<!-- (?P<key>skip|file): (?P<value>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<body>.*?)^```",
                   re.S | re.M)
COMMANDS = {"qcn-compile": cli.main, "qcn-opt": opt.main, "qcn-inspect": inspect_cli.main, "qcn-run": run_cli.main}
RUN = ["quick-start.md", "writing-a-pass.md", "writing-a-kernel.md", "adding-a-target.md", "troubleshooting.md",
       "onnx.md"]


@pytest.fixture(autouse=True)
def one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds share the trace: passes work on a copy."""
    monkeypatch.setattr(sys.modules["qcn_compile.compile"], "trace_model", traced)
    monkeypatch.setattr("qcn_compile.onnx.emit.trace_model", traced)


traced = cache(sys.modules["qcn_compile.compile"].trace_model)


def command(line: str) -> None:
    """One qcn-* command, in this process; `> FILE` takes its output."""
    words = shlex.split(line)
    target = Path(words[words.index(">") + 1]) if ">" in words else Path("/dev/null")
    words = words[:words.index(">")] if ">" in words else words
    with target.open("w") as out, contextlib.redirect_stdout(out):
        assert COMMANDS[words[0]](words[1:]) == 0, line


@pytest.mark.parametrize("page", RUN)
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "onnx.md":
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(DOCS)
    module = ModuleType("page_" + page.removesuffix(".md").replace("-", "_"))  # dataclasses look it up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in BLOCK.finditer((DOCS / page).read_text(encoding="utf-8")):
        if block["key"] == "skip":
            continue
        if block["key"] == "file":
            Path(block["value"]).write_text(block["body"], encoding="utf-8")
        elif block["language"] == "python":
            exec(compile(block["body"], page, "exec", dont_inherit=True), module.__dict__)
        elif block["language"] == "bash":
            for line in filter(None, block["body"].splitlines()):
                command(line)


def test_quick_start_leads_to_a_report(tmp_path: Path) -> None:
    """What the last step of the quick start promises, told by the page's own text."""
    text = (DOCS / "quick-start.md").read_text(encoding="utf-8")
    assert text.index("## 5. Write a pass") < text.index("--plugin my_silu.py") < text.index("--html report.html")


def test_generated_pages_are_current() -> None:
    done = subprocess.run([sys.executable, str(DOCS / "generate.py"), "--check"], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_every_page_is_reachable_from_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert all(f"({page.name})" in index for page in PAGES if page.name != "README.md")
