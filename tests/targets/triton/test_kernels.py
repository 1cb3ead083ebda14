"""Every kernel in the repaired interpreter against the op table in fp32: outputs, caches, ragged batches."""

from __future__ import annotations

import pytest
from cases import Trialled, every
from harness_gpu import check
from interpreter import Interpreter

from qcn_compile.targets.triton.target import GpuTarget

TARGET = GpuTarget("h200")


@pytest.mark.parametrize("trialled", every(), ids=lambda t: t[0].name)
def test_kernels(interpreter: Interpreter, trialled: Trialled) -> None:
    case, batches = trialled
    for seed, ragged in enumerate(batches):
        check(interpreter, TARGET, case, ragged, seed)
