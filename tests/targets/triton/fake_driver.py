"""A CUDA driver made of Python: remembers what it is asked, runs nothing."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from types import SimpleNamespace
from typing import Any


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class FakeDriver:
    """Stands for the module `cuda.bindings.driver`. Host memory plays the device's."""

    CUstreamCaptureMode = staticmethod(lambda mode: mode)
    CUlaunchConfig = CUlaunchAttribute = CUlaunchAttributeValue = SimpleNamespace
    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
                                         CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
                                         CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN="shared",
                                         CU_DEVICE_ATTRIBUTE_MAX_PITCH="pitch")
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_HOST="Host", CU_MEMORYTYPE_DEVICE="Device")
    CUDA_MEMCPY2D = SimpleNamespace

    def __init__(self, arch: int = 90, memory: int = 8 << 30, shared: int = 232448) -> None:
        self.attributes = {"major": arch // 10, "minor": arch % 10, "shared": shared, "pitch": 2**31 - 1}
        self.free = memory
        self.memory: dict[int, Any] = {}
        self.launches: list[tuple[Any, list[int]]] = []
        self.calls: list[str] = []
        self.pointers: dict[int, int] = {}
        self.capturing: list[Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *args: self._call(name, args)

    def _call(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.calls.append(name)
        answer = getattr(self, f"_{name}", None)
        if answer is None:
            return (Result.CUDA_SUCCESS, f"{name}-handle")
        return answer(*args)

    def _cuDeviceGetName(self, length: int, device: Any) -> tuple[Any, ...]:
        return Result.CUDA_SUCCESS, b"Fake H200".ljust(length, b"\0")

    def _cuDeviceGetAttribute(self, which: str, device: Any) -> tuple[Any, ...]:
        return Result.CUDA_SUCCESS, self.attributes[which]

    def _cuMemGetInfo(self) -> tuple[Any, ...]:
        return Result.CUDA_SUCCESS, self.free, self.free

    def _take(self, nbytes: int) -> int:
        block = (ctypes.c_uint8 * (nbytes + 256))()
        address = -(-ctypes.addressof(block) // 256) * 256
        self.memory[address] = block
        return address

    def _cuMemAlloc(self, nbytes: int) -> tuple[Any, ...]:
        if nbytes > self.free:
            return (Result.CUDA_ERROR_OUT_OF_MEMORY,)
        self.free -= nbytes
        return Result.CUDA_SUCCESS, self._take(nbytes)

    def _cuMemFree(self, pointer: int) -> tuple[Any, ...]:
        self.free += len(self.memory.pop(pointer)) - 256
        return (Result.CUDA_SUCCESS,)

    def _cuMemHostAlloc(self, nbytes: int, flags: int) -> tuple[Any, ...]:
        return Result.CUDA_SUCCESS, self._take(nbytes)

    def _cuMemHostGetDevicePointer(self, pointer: int, flags: int) -> tuple[Any, ...]:
        return Result.CUDA_SUCCESS, pointer

    def _copy(self, to: int, source: int, nbytes: int, *stream: Any) -> tuple[Any, ...]:
        ctypes.memmove(to, source, nbytes)
        return (Result.CUDA_SUCCESS,)

    _cuMemcpyHtoD = _cuMemcpyHtoDAsync = _cuMemcpyDtoHAsync = _cuMemcpyDtoDAsync = _copy

    def _cuMemcpy2DAsync(self, copy: Any, stream: Any) -> tuple[Any, ...]:
        to, source = getattr(copy, f"dst{copy.dstMemoryType}"), getattr(copy, f"src{copy.srcMemoryType}")
        for row in range(copy.Height):
            ctypes.memmove(to + row * copy.dstPitch, source + row * copy.srcPitch, copy.WidthInBytes)
        return (Result.CUDA_SUCCESS,)

    def _cuModuleLoadData(self, image: int) -> tuple[Any, ...]:
        return Result.CUDA_SUCCESS, image

    def _cuFuncGetParamInfo(self, function: Any, index: int) -> tuple[Any, ...]:
        return Result.CUDA_SUCCESS, 8 * index, 8

    def _cuLaunchKernelEx(self, config: Any, function: Any, addresses: int, extra: int) -> tuple[Any, ...]:
        if self.capturing is not None:
            self.capturing.append((config, addresses))
        self.launches.append((config, addresses))  # type: ignore[arg-type]
        return (Result.CUDA_SUCCESS,)

    def _cuStreamBeginCapture(self, stream: Any, mode: int) -> tuple[Any, ...]:
        self.capturing = []
        return (Result.CUDA_SUCCESS,)

    def _cuStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        graph, self.capturing = self.capturing, None
        return Result.CUDA_SUCCESS, graph

    def _cuGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        return Result.CUDA_SUCCESS, graph

    def _cuGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        return (Result.CUDA_SUCCESS,)


def arguments(addresses: int, count: int) -> list[int]:
    """The values behind a launch's void*[]."""
    pointers = (ctypes.c_uint64 * count).from_address(addresses)
    return [ctypes.c_uint64.from_address(p).value for p in pointers]
