"""One compiled library for all programs of the collected tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from harness import PROGRAMS, Lab

from qcn_compile.targets.cpu import CpuTarget


@pytest.fixture(scope="session", params=["host", "x86-64-v3"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Every registered program compiled once for this processor, and once for one without AVX-512."""
    target = CpuTarget(request.param)
    if request.param != "host" and CpuTarget().hardware.features == target.hardware.features:
        pytest.skip("this processor is of that level")
    torch.set_num_threads(1)
    made = Lab(tmp_path_factory.mktemp("kernels"), PROGRAMS, target)
    yield made
    made.host.c.qcn_host_shutdown()
