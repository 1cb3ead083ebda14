"""The build that the tests of qcn-inspect look into."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

import qcn_compile as qcn
from tests.sharing import one_trace


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One int4 build, made by the first worker that asks."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "qcn-inspect"  # of this run only
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock, one_trace():
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "build/manifest.json").is_file():
            qcn.compile(None, "cpu", shared / "build", quant="int4")
    return shared / "build"
