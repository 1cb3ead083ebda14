"""The quick start as a newcomer follows it: a fresh clone and environment, every block of the page, timed.

    python -m tests.bench.newcomer [FOLDER]

Prints a line a block, and at the end whether the report shows the pass. Needs the network, for pip.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(?:<!-- (?P<key>skip|file): (?P<value>[^>]*?) -->\n)?```(?P<language>\w+)\n(?P<body>.*?)```", re.S)
HEAD = re.compile(r"^## (.*)$", re.M)


def follow(clone: Path) -> list[tuple[str, str, float]]:
    """Do what docs/quick-start.md of a clone says, in it: (section, first words, seconds) of every block."""
    page = (clone / "docs/quick-start.md").read_text(encoding="utf-8")
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    rows = []
    for block in BLOCK.finditer(page):
        section = HEAD.findall(page[:block.start()])[-1]
        start, body = time.perf_counter(), block["body"]
        enter = ". venv/bin/activate\n" if (clone / "venv").is_dir() else ""
        if block["key"] == "file":
            (clone / block["value"]).write_text(body, encoding="utf-8")
        elif block["language"] == "bash":
            subprocess.run(["bash", "-e"], input=enter + body, cwd=clone, env=plain, text=True, check=True,
                           stdout=subprocess.DEVNULL)
        else:
            subprocess.run(["bash", "-e"], input=f"{enter}python - <<'END_OF_BLOCK'\n{body}END_OF_BLOCK\n", cwd=clone,
                           env=plain, text=True, check=True, stdout=subprocess.DEVNULL)
        rows.append((section, body.strip().splitlines()[0][:50], time.perf_counter() - start))
        print(f"{rows[-1][2]:8.1f} s  {section}: {rows[-1][1]}", flush=True)
    return rows


def main() -> None:
    """Clone, follow, sum up."""
    with tempfile.TemporaryDirectory(prefix="newcomer-", dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        rows = follow(clone)
        report = (clone / "report.html").read_text(encoding="utf-8")
        assert '"my_silu_mul"' in report and '"my silu":8' in report, "the report does not show the pass"
        assert list(clone.glob("build-silu/kernels/source/custom_my_silu_mul_*.py")), "the kernel's source is missing"
        print(f"{sum(r[2] for r in rows):8.1f} s in all; the report shows the pass")


if __name__ == "__main__":
    main()
