"""The documentation runs: python blocks, commands, servers; generated pages are current; the site builds strictly."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.reader import COMMANDS, Reader
from tests.sharing import one_trace

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
ALL = [ROOT / "README.md", *PAGES]
BLOCK = re.compile(r"(?:<!-- (?P<key>skip|file): (?P<value>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```",
                   re.S | re.M)
SHOWN = ("text", "json", "toml", "yaml")  # no code
RUN = [page for page in ALL if any(b["language"] in ("python", "bash") and b["key"] != "skip"
                                   for b in BLOCK.finditer(page.read_text(encoding="utf-8")))]


@pytest.fixture(autouse=True)
def shared_trace() -> Iterator[None]:
    with one_trace():
        yield


def lines(body: str) -> list[str]:
    """The commands of a block, lines that go on joined."""
    return [line for line in body.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("page", RUN, ids=lambda p: p.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name == "onnx.md":
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(DOCS)
    module = ModuleType("page_" + page.stem.replace("-", "_"))  # dataclasses look it up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with Reader(tmp_path) as reader:
        for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
            if block["key"] == "skip":
                continue
            if block["key"] == "file":
                Path(block["value"]).write_text(block["body"], encoding="utf-8")
            elif block["language"] == "python":
                exec(compile(block["body"], page.name, "exec", dont_inherit=True), module.__dict__)
            elif block["language"] == "bash":
                for line in lines(block["body"]):
                    reader.run(line)


@pytest.mark.parametrize("page", ALL, ids=lambda p: p.name)
def test_no_block_is_left_out_silently(page: Path) -> None:
    """Code runs, or installs packages or is this suite: then a reason stands above it and its flags exist."""
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^ *```", text, re.M)) == 2 * len(list(BLOCK.finditer(text))), "an indented or open block"
    for block in BLOCK.finditer(text):
        assert block["language"] in ("python", "bash", *SHOWN), f"{page.name}: language of {block['body'][:60]!r}"
        if block["key"] == "skip":
            assert len(block["value"].split()) >= 2, f"{page.name}: why is {block['body'][:60]!r} skipped?"
            assert re.search(r"pip install|tools/test", block["body"]), f"{page.name}: {block['body'][:60]!r} could run"
            for line in lines(block["body"]) if block["language"] == "bash" else ():
                words = shlex.split(line, comments=True)
                if words and words[0] in COMMANDS:
                    COMMANDS[words[0]].parser().parse_args(words[1:])


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    words = ["build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path / "site")]
    done = subprocess.run([sys.executable, "-m", "mkdocs", *words], capture_output=True, text=True, check=False,
                          env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    pages = {page.parent.name for page in (tmp_path / "site").glob("*/index.html")}
    assert pages >= {page.stem for page in PAGES if page.name != "README.md"}
    text = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', text)  # nothing is fetched to read it


def test_quick_start_leads_to_a_report(tmp_path: Path) -> None:
    """What the last step of the quick start promises, told by the page's own text."""
    text = (DOCS / "quick-start.md").read_text(encoding="utf-8")
    assert text.index("## 5. Write a pass") < text.index("--plugin my_silu.py") < text.index("--html report.html")


def test_generated_pages_are_current() -> None:
    done = subprocess.run([sys.executable, str(DOCS / "generate.py"), "--check"], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_command_and_flag_is_explained() -> None:
    text = (DOCS / "cli-reference.md").read_text(encoding="utf-8")
    assert not re.findall(r"^\| `[^`]+` \|\s*\|$", text, re.M)
    assert not re.findall(r"^## [^\n]+\n\s*(?=\||##|\Z)", text, re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_every_page_is_reachable_from_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert all(f"({page.name})" in index for page in PAGES if page.name != "README.md")
