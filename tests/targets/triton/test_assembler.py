"""The assembler keeps 64-bit descriptors of wgmma whole: ptxas 12.8 took the low half for both."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from cases import every

from qcn_compile.errors import UsageError
from qcn_compile.targets.base import Kernel
from qcn_compile.targets.triton import emit
from qcn_compile.targets.triton.emit import ptxas
from qcn_compile.targets.triton.target import GpuTarget

pytest.importorskip("triton")


def halves_mixed_up(sass: str) -> list[str]:
    """Additions of upper halves that read the register whose lower half the carry came from, not written since."""
    low: dict[str, tuple[str, str]] = {}  # carry -> the register added to, the instruction
    found = []
    for line in sass.splitlines():
        match = re.match(r"(?:@!?U?P\d )?(\S+)\s+(.*?)\s*;", re.sub(r"/\*.*?\*/", "", line).strip())
        if match is None:
            continue
        name, (target, *operands) = match[1], match[2].split(", ")
        carry = next((o for o in (target, *operands) if re.fullmatch(r"UP\d", o)), None)
        if name == "UIADD3.X" and carry in low and low[carry][0] in operands:
            found.append(f"{low[carry][1]} ... {match[0]}")
        written = {target, f"UR{int(target[2:]) + 1}"} if re.fullmatch(r"UR\d+", target) and ".64" in name else {target}
        low = {key: value for key, value in low.items() if value[0] not in written}
        if name == "UIADD3" and carry is not None and operands[1:2] and operands[1] != target:
            low[carry] = operands[1], match[0]
    return found


def test_the_pattern_is_seen() -> None:
    wrong = "UIADD3 UR14, UP0, UR5, 0x40, URZ ;\nUIADD3.X UR15, UR5, -0x7fffffe0, URZ, UP0, !UPT ;"
    assert halves_mixed_up(wrong) and not halves_mixed_up(wrong.replace("\n", "\nUMOV UR5, URZ ;\n"))


def test_products_from_small_tiles_have_whole_descriptors(tmp_path: Path) -> None:
    """delta_solve with values of 32: wrong on an H100 from token 16 of a chunk on when assembled by ptxas 12.8."""
    from triton import knobs

    card = GpuTarget("h100")
    case = next(case for case, _ in every() if case.name == "delta_net 1 3 16 32 prefill-64")
    kernels = [call.kernel for _, call in case.lower(card) if call.kernel.family == "delta_solve"]
    _, name = card.emit(kernels, tmp_path)
    sass = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", tmp_path / name], capture_output=True, text=True,
                          check=True).stdout
    assert "HGMMA" in sass and not halves_mixed_up(sass)


def _one_kernel() -> list[Kernel]:
    case = next(case for case, _ in every() if case.name == "rms_norm")
    return [call.kernel for _, call in case.lower(GpuTarget("h100"))][:1]


def test_another_assembler_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, asked = tmp_path / "ptxas", tmp_path / "asked"
    other.write_text(f'#!/bin/sh\ntouch "{asked}"\nexec "{ptxas()}" "$@"\n')
    other.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(other))
    GpuTarget("h100").emit(_one_kernel(), tmp_path / "kernels")
    assert asked.is_file()


def test_without_an_assembler_the_cure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    monkeypatch.setattr(emit, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install nvidia-cuda-nvcc-cu12==12\.9\.86"):
        GpuTarget("h100").emit(_one_kernel(), tmp_path)
