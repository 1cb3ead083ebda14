"""The build that the tests of qcn-inspect look into."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

import pytest

import qcn_compile as qcn

sys.path.insert(0, str(Path(__file__).parent))
from inspected import traced


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One int4 build, made by the first worker that asks."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "qcn-inspect"  # of this run only
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "build/manifest.json").is_file():
            patch.setattr(sys.modules["qcn_compile.compile"], "trace_model", traced)
            qcn.compile(None, "cpu", shared / "build", quant="int4")
    return shared / "build"
