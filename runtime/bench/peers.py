"""`qcn-bench cpu --vs llama.cpp`: other programs on this CPU. Lives in tests/bench, so it needs a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from qcn_compile.errors import UsageError
from qcn_compile.runtime.bench.sides import ROOT

MODULE = "tests.bench.cpu_vs_llama"
TEXT = "int4 and int8 on this CPU beside llama.cpp and transformers (needs a git checkout)"


def add_parser(commands: Any) -> None:
    """The subcommand, into those of qcn-bench; its flags are the module's."""
    commands.add_parser("cpu", help=TEXT, description=f"{TEXT}; `qcn-bench cpu --help` lists its flags", add_help=False)


def run(words: Sequence[str]) -> int:
    """Run the comparison. Raises UsageError where it is not there."""
    if not (ROOT / "tests/bench/cpu_vs_llama.py").is_file():
        raise UsageError("qcn-bench cpu: this qcn-compile is installed, not a git checkout; "
                         "clone the repository, install it with its compile extra and run it there")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run([sys.executable, "-m", MODULE, *words], cwd=os.getcwd(), check=False,
                          env={**os.environ, "PYTHONPATH": path}).returncode
