"""The CUDA runtime over a fake driver: what is launched, with which arguments; what it says when things are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_driver import FakeDriver, Result, arguments

from qcn_compile.errors import ArtifactError, CapacityError, DeviceError
from qcn_compile.runtime.cuda import driver as driver_module
from qcn_compile.runtime.cuda.device import CudaDevice
from qcn_compile.runtime.cuda.driver import Driver
from qcn_compile.runtime.cuda.weights import filling

TARGET = {"name": "h200", "arch": 90}


def device(fake: FakeDriver) -> CudaDevice:
    return CudaDevice(TARGET, driver=Driver(fake))


def kernels(folder: Path, **changes: Any) -> Path:
    """A kernel folder with one kernel of two pointers."""
    row = {"file": "k.cubin", "entry": "k", "shared": 1000, "threads": 128, "pdl": True, "pointers": 2, "loose": [1],
           **changes}
    (folder / "kernels.json").write_text(json.dumps({"k": row}))
    (folder / "k.cubin").write_bytes(b"cubin")
    return folder


def test_a_launch_as_the_driver_sees_it(tmp_path: Path) -> None:
    fake = FakeDriver()
    card = device(fake)
    card.load(kernels(tmp_path), {"k"})
    assert str(card) == "Fake H200" and card.loose("k") == {1}
    prepared = card.prepare("k", (7, 2), [4096, 8192])
    card.launch(prepared)
    (config, addresses), = fake.launches
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (7, 2, 1)
    assert (config.blockDimX, config.sharedMemBytes, config.numAttrs) == (128, 1000, 1)
    assert config.attrs[0].value.programmaticStreamSerializationAllowed == 1
    assert arguments(addresses, 4) == [4096, 8192, 0, 0]  # two pointers for scratch that Triton appends


def test_a_graph_keeps_what_was_launched(tmp_path: Path) -> None:
    fake = FakeDriver()
    card = device(fake)
    card.load(kernels(tmp_path, pdl=False), {"k"})
    prepared = card.prepare("k", (1,), [0, 0])
    graph = card.capture(lambda: (card.launch(prepared), card.launch(prepared))[0])
    assert len(graph) == 2 and prepared.config.numAttrs == 0


def test_large_shared_memory_is_asked_for(tmp_path: Path) -> None:
    fake = FakeDriver()
    device(fake).load(kernels(tmp_path, shared=100_000), {"k"})
    assert "cuFuncSetAttribute" in fake.calls
    with pytest.raises(ArtifactError, match="needs 300000 bytes of shared memory, Fake H200 allows 232448"):
        device(FakeDriver()).load(kernels(tmp_path, shared=300_000), {"k"})


def test_errors_name_the_thing_and_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match=r"the build is for h200 \(sm_90\), this GPU is Fake H200 \(sm_80\)"):
        device(FakeDriver(arch=80))
    CudaDevice({"name": "a100", "arch": 80}, driver=Driver(FakeDriver(arch=86)))  # sm_80 code runs on every 8.x
    card = device(FakeDriver())
    card.load(kernels(tmp_path), {"k"})
    with pytest.raises(ArtifactError, match="has no kernel absent"):
        card.load(tmp_path, {"absent"})
    with pytest.raises(ArtifactError, match="takes 2 pointers, the plan gives 1"):
        card.prepare("k", (1,), [0])
    with pytest.raises(CapacityError, match="not enough free memory; lower --context-length"):
        device(FakeDriver(memory=100)).allocate(1 << 30)
    monkeypatch.setattr(FakeDriver, "_cuStreamSynchronize", lambda self, stream: (Result.CUDA_ERROR_ILLEGAL_ADDRESS,),
                        raising=False)
    with pytest.raises(DeviceError, match="cuStreamSynchronize failed with CUDA_ERROR_ILLEGAL_ADDRESS"):
        card.synchronize()
    card.close()
    card.close()


def test_without_bindings_or_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DeviceError, match=r"pip install 'qcn-compile\[cuda\]'"):
        driver_module.bindings()

    class NoLibrary:
        def cuInit(self, flags: int) -> None:
            raise RuntimeError("Failed to dlopen libcuda.so.1")

    with pytest.raises(DeviceError, match="this machine has no NVIDIA driver"):
        Driver(NoLibrary())("cuInit", 0)


@pytest.mark.parametrize("kind", ["fp8", "scale", "bf16", "f32"])
def test_dummy_numbers_are_finite(kind: str) -> None:
    data = filling(kind, 1 << 16)
    assert data.nbytes == 1 << 16
    if kind == "fp8":
        assert not ((data & 0x7F) == 0x7F).any()
    elif kind == "bf16":
        values = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        assert np.isfinite(values).all() and 0.015 < values.std() < 0.025
    else:
        assert np.isfinite(data.view(np.float32)).all()
    with pytest.raises(ArtifactError, match="kind 'int3'"):
        filling("int3", 64)
