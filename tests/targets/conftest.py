"""One compiled library for all programs of the collected tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from harness import PROGRAMS, Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Compiles every registered program once."""
    torch.set_num_threads(1)
    made = Lab(tmp_path_factory.mktemp("kernels"), PROGRAMS)
    yield made
    made.host.c.qcn_host_shutdown()
