"""The table of tokens in host memory, over the fake driver: where it lies, what the card saves, that nothing moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_driver import FakeDriver
from safetensors.numpy import save_file

from qcn_compile.artifact import Arg, Launch, Plan
from qcn_compile.runtime.cuda.device import CudaDevice
from qcn_compile.runtime.cuda.driver import Driver
from qcn_compile.runtime.cuda.weights import DeviceWeights, host_bytes, look_ups, total_bytes

SIZES = {"a.w": 640, "table.w": 1280, "b.w": 192, "c.w": 64}


def plan(entry: str, uses: dict[str, str]) -> Plan:
    launches = [Launch("k", (Arg("weight", name),), f"{op} %x", "here", 0, 0, (1,)) for op, name in uses.items()]
    return Plan(entry, "decode-1", 1, 1, 1, 64, tuple(launches), {})


def test_only_tables_that_nothing_multiplies_are_moved() -> None:
    alone = [plan("main", {"embedding": "table.w", "linear": "head.w"}), plan("mtp", {"embedding": "table.w"})]
    assert look_ups(alone) == {"table.w"}
    assert look_ups([*alone, plan("mtp", {"embedding": "table.w", "linear": "table.w"})]) == frozenset()  # tied


def specs(folder: Path) -> dict[str, dict[str, object]]:
    """The same blobs in files, as recipes and made up."""
    data = {name: np.full(size, i + 1, np.uint8) for i, (name, size) in enumerate(SIZES.items())}
    for place, names in enumerate((["a.w", "table.w", "b.w"], ["c.w"])):
        save_file({name: data[name] for name in names}, folder / f"{place}.safetensors")
        file = folder / f"{place}.safetensors"  # ours start their blobs on 64 bytes
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        pad = -(8 + length) % 64
        file.write_bytes((length + pad).to_bytes(8, "little") + raw[8:8 + length] + b" " * pad + raw[8 + length:])
    return {"copied": {"mode": "copied", "files": ["0.safetensors", "1.safetensors"]},
            "dummy": {"mode": "dummy", "files": [],
                      "blobs": {name: {"bytes": size, "fill": "bf16"} for name, size in SIZES.items()}}}


@pytest.mark.parametrize("mode", ["copied", "dummy"])
def test_the_card_holds_all_but_the_table(mode: str, tmp_path: Path) -> None:
    spec, fake = specs(tmp_path)[mode], FakeDriver()
    device = CudaDevice({"arch": 90, "name": "h100"}, driver=Driver(fake))
    before = fake.free
    weights = DeviceWeights(tmp_path, spec, device, on_host={"table.w"})
    assert before - fake.free == weights.nbytes == total_bytes(tmp_path, spec, {"table.w"})
    assert total_bytes(tmp_path, spec) - weights.nbytes == weights.host_bytes == 1280
    assert host_bytes(tmp_path, spec, {"table.w"}) == 1280 and fake.calls.count("cuMemHostGetDevicePointer") == 1
    taken = [range(p, p + len(block) - 256) for p, block in fake.memory.items()]
    for number, (name, size) in enumerate(SIZES.items(), 1):
        address, got = weights.address(name), np.empty(size, np.uint8)
        assert any(address in r and address + size - 1 in r for r in taken) and address % 64 == 0
        fake._copy(got.ctypes.data, address, size)
        assert (got == number).all() if mode == "copied" else got.any()
    apart = DeviceWeights(tmp_path, spec, device)
    assert apart.host_bytes == 0 and apart.nbytes == total_bytes(tmp_path, spec)
    weights.replace("table.w", np.full(1280, 9, np.uint8))
    fake._copy(got.ctypes.data, weights.address("table.w"), 64)
    assert got[0] == 9


