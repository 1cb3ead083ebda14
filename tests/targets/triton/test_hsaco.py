"""AMD cards: kernels compile to code objects for them. Untested beyond that: no runtime of ours launches them."""

from __future__ import annotations

import struct

import pytest
from harness_gpu import DECODE_1, PREFILL
from test_emit import full_size

from qcn_compile.targets.triton.emit import compile_amd

ELF, AMDGPU = b"\x7fELF", 224
CHIPS = {"gfx942": 0x4C, "gfx950": 0x4F}  # EF_AMDGPU_MACH of the ELF header's flags


def check(made: tuple[bytes, dict[str, object]], arch: str) -> None:
    code, row = made
    assert row["registers"] and row["stack"] == 0 and row["threads"]
    machine, flags = struct.unpack_from("<H", code, 18)[0], struct.unpack_from("<I", code, 48)[0]
    assert code[:4] == ELF and machine == AMDGPU and flags & 0xFF == CHIPS[arch]


@pytest.mark.parametrize("arch", CHIPS)
def test_a_norm_and_a_product(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels = {k.family: k for k in full_size(DECODE_1)}
    check(compile_amd(kernels["rms_norm"], arch), arch)
    check(compile_amd(kernels["product"], arch), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("bucket", [DECODE_1, PREFILL], ids=lambda b: b.name)
def test_full_size(arch: str, bucket: object) -> None:
    for kernel in full_size(bucket):  # type: ignore[arg-type]
        check(compile_amd(kernel, arch), arch)
