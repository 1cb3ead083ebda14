"""A GPU: its context and stream, memory taken once, kernels loaded, launches prepared, graphs captured and replayed."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcn_compile.errors import ArtifactError, DeviceError
from qcn_compile.runtime.cuda.driver import Driver

INDEX = "kernels.json"
SCRATCH_POINTERS = 2  # Triton appends two: scratch in global memory and for its profiler; our kernels use neither
DEFAULT_SHARED = 48 << 10
ALIGNMENT = 16  # kernels were promised pointers at multiples of this
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
MAPPED = 2  # CU_MEMHOSTALLOC_DEVICEMAP
NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
REBUILD = "build again with qcn-compile"


@dataclass(frozen=True)
class Function:
    """A loaded kernel and how it is launched."""

    handle: Any
    row: dict[str, Any]


@dataclass
class Prepared:
    """One launch, ready: its configuration, and the argument block that the driver reads."""

    function: Function
    config: Any
    values: np.ndarray
    addresses: np.ndarray


class CudaDevice:
    """One GPU with the kernels of one build. Raises ArtifactError when the build is for another card."""

    def __init__(self, target: dict[str, Any], index: int = 0, driver: Driver | None = None) -> None:
        self.driver = call = driver or Driver()
        call("cuInit", 0)
        self._device = call("cuDeviceGet", index)
        self._context = call("cuDevicePrimaryCtxRetain", self._device)
        self.activate()
        self.name = call("cuDeviceGetName", 128, self._device).split(b"\0")[0].decode()
        self._check(target)
        self.stream = call("cuStreamCreate", NON_BLOCKING)
        self._widest = self._attribute("MAX_PITCH")
        self._functions: dict[str, Function] = {}
        self._allocated: list[Any] = []
        self._pinned: list[int] = []
        self._open = True

    def __str__(self) -> str:
        return self.name

    def _attribute(self, name: str) -> int:
        which = getattr(self.driver.api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self.driver("cuDeviceGetAttribute", which, self._device))

    def _check(self, target: dict[str, Any]) -> None:
        have = 10 * self._attribute("COMPUTE_CAPABILITY_MAJOR") + self._attribute("COMPUTE_CAPABILITY_MINOR")
        want = int(target["arch"])
        if have != want and not (want == 80 and 80 <= have < 90):
            raise ArtifactError(f"the build is for {target['name']} (sm_{want}), this GPU is {self.name} (sm_{have}); "
                                "build again with the --target of this card")

    def activate(self) -> None:
        """Make this GPU the calling thread's."""
        self.driver("cuCtxSetCurrent", self._context)

    def free_bytes(self) -> int:
        """Memory nobody has taken."""
        return int(self.driver("cuMemGetInfo")[0])

    def allocate(self, nbytes: int) -> int:
        """Device memory until the device closes. Raises CapacityError when there is not enough."""
        pointer = self.driver("cuMemAlloc", max(nbytes, 64))
        self._allocated.append(pointer)
        return int(pointer)

    def free(self, pointer: int) -> None:
        """Give one allocation back before the device closes."""
        place = next(i for i, taken in enumerate(self._allocated) if int(taken) == pointer)
        self.driver("cuMemFree", self._allocated.pop(place))

    def pinned(self, nbytes: int) -> np.ndarray:
        """Host memory, u8, that copies to and from the device without a detour."""
        pointer = int(self.driver("cuMemHostAlloc", max(nbytes, 64), MAPPED))
        self._pinned.append(pointer)
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer))

    def mapped(self, nbytes: int) -> tuple[np.ndarray, int]:
        """Host memory that kernels read over the bus: u8, and the address that they use."""
        data = self.pinned(nbytes)
        return data, int(self.driver("cuMemHostGetDevicePointer", data.ctypes.data, 0))

    def upload(self, to: int, data: np.ndarray) -> None:
        """Host array to device memory; returns when done."""
        self.driver("cuMemcpyHtoD", to, data.ctypes.data, data.nbytes)

    def upload_soon(self, to: int, data: np.ndarray) -> None:
        """Pinned array to device memory, in the stream."""
        self.driver("cuMemcpyHtoDAsync", to, data.ctypes.data, data.nbytes, self.stream)

    def download_soon(self, data: np.ndarray, source: int) -> None:
        """Device memory to a pinned array, in the stream."""
        self.driver("cuMemcpyDtoHAsync", data.ctypes.data, source, data.nbytes, self.stream)

    def copy_rows(self, to: int, to_pitch: int, source: int, pitch: int, width: int, rows: int, way: str) -> None:
        """`rows` times `width` bytes, each `pitch` further, in the stream. way: HtoD, DtoH (pinned) or DtoD."""
        if max(to_pitch, pitch) > self._widest:
            for row in range(rows):
                self.driver(f"cuMemcpy{way}Async", to + row * to_pitch, source + row * pitch, width, self.stream)
            return
        api = self.driver.api
        copy, kinds = api.CUDA_MEMCPY2D(), api.CUmemorytype
        if way[0] == "H":
            copy.srcMemoryType, copy.srcHost = kinds.CU_MEMORYTYPE_HOST, source
        else:
            copy.srcMemoryType, copy.srcDevice = kinds.CU_MEMORYTYPE_DEVICE, source
        if way[-1] == "H":
            copy.dstMemoryType, copy.dstHost = kinds.CU_MEMORYTYPE_HOST, to
        else:
            copy.dstMemoryType, copy.dstDevice = kinds.CU_MEMORYTYPE_DEVICE, to
        copy.srcPitch, copy.dstPitch, copy.WidthInBytes, copy.Height = pitch, to_pitch, width, rows
        self.driver("cuMemcpy2DAsync", copy, self.stream)

    def synchronize(self) -> None:
        """Wait for everything in the stream."""
        self.driver("cuStreamSynchronize", self.stream)

    def load(self, folder: Path, names: set[str]) -> None:
        """Load the named kernels of a build's kernel folder. Raises ArtifactError when one is missing."""
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        shared = self._attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        for name in sorted(names):
            if name not in index:
                raise ArtifactError(f"{folder} has no kernel {name}; {REBUILD}")
            self._functions[name] = self._load(folder, name, index[name], shared)

    def _load(self, folder: Path, name: str, row: dict[str, Any], shared: int) -> Function:
        if row["shared"] > shared:
            raise ArtifactError(f"kernel {name} needs {row['shared']} bytes of shared memory, {self.name} allows "
                                f"{shared}; build again with the --target of this card")
        image = np.frombuffer((folder / row["file"]).read_bytes() + b"\0", np.uint8)
        module = self.driver("cuModuleLoadData", image.ctypes.data)
        handle = self.driver("cuModuleGetFunction", module, row["entry"].encode())
        if row["shared"] > DEFAULT_SHARED:
            most = self.driver.api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self.driver("cuFuncSetAttribute", handle, most, row["shared"])
        last = row["pointers"] + SCRATCH_POINTERS - 1
        if int(self.driver("cuFuncGetParamInfo", handle, last)[1]) != 8:
            raise ArtifactError(f"kernel {name} takes other arguments than {INDEX} says; {REBUILD}")
        return Function(handle, row)

    def loose(self, kernel: str) -> set[int]:
        """Places of the pointers that need no alignment."""
        return set(self._functions[kernel].row["loose"])

    def prepare(self, kernel: str, grid: Sequence[int], pointers: Sequence[int]) -> Prepared:
        """A launch with its arguments fixed."""
        function = self._functions[kernel]
        if len(pointers) != function.row["pointers"]:
            raise ArtifactError(f"kernel {kernel} takes {function.row['pointers']} pointers, the plan gives "
                                f"{len(pointers)}; {REBUILD}")
        values = np.array([*pointers, *[0] * SCRATCH_POINTERS], np.uint64)
        addresses = values.ctypes.data + 8 * np.arange(len(values), dtype=np.uint64)
        api = self.driver.api
        config = api.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = function.row["threads"], 1, 1
        config.sharedMemBytes, config.hStream = function.row["shared"], self.stream
        config.attrs = [self._overlap()] if function.row["pdl"] else []
        config.numAttrs = len(config.attrs)
        return Prepared(function, config, values, addresses)

    def _overlap(self) -> Any:
        """The attribute that lets a kernel start while the one before it ends."""
        api = self.driver.api
        attribute, value = api.CUlaunchAttribute(), api.CUlaunchAttributeValue()
        attribute.id = api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        value.programmaticStreamSerializationAllowed = 1
        attribute.value = value
        return attribute

    def launch(self, prepared: Prepared) -> None:
        """Put one launch into the stream."""
        self.driver("cuLaunchKernelEx", prepared.config, prepared.function.handle, prepared.addresses.ctypes.data, 0)

    def capture(self, work: Callable[[], None]) -> Any:
        """What `work` puts into the stream, as a graph ready to be replayed."""
        mode = self.driver.api.CUstreamCaptureMode(THREAD_LOCAL)
        self.driver("cuStreamBeginCapture", self.stream, mode)
        try:
            work()
        finally:
            graph = self.driver("cuStreamEndCapture", self.stream)
        ready = self.driver("cuGraphInstantiate", graph, 0)
        self.driver("cuGraphDestroy", graph)
        self.driver("cuGraphUpload", ready, self.stream)
        return ready

    def replay(self, graph: Any) -> None:
        """Put a graph into the stream."""
        self.driver("cuGraphLaunch", graph, self.stream)

    def event(self, timed: bool = True) -> Any:
        """A new event, one that can be timed or a cheaper one."""
        return self.driver("cuEventCreate", 0 if timed else NO_TIMING)

    def record(self, event: Any) -> None:
        """Mark the present end of the stream."""
        self.driver("cuEventRecord", event, self.stream)

    def wait(self, event: Any) -> None:
        """Until what was in the stream when the event was recorded has ended."""
        self.driver("cuEventSynchronize", event)

    def seconds(self, first: Any, last: Any) -> float:
        """Time between two events that have passed."""
        return float(self.driver("cuEventElapsedTime", first, last)) / 1e3

    def close(self) -> None:
        """Give everything back. Calling twice is fine."""
        if not self._open:
            return
        self._open = False
        self.activate()
        try:
            self.synchronize()
        except DeviceError:  # a failed kernel leaves a context that answers nothing any more; memory goes with it
            return
        for pointer in self._allocated:
            self.driver("cuMemFree", pointer)
        for address in self._pinned:
            self.driver("cuMemFreeHost", address)
        self.driver("cuDevicePrimaryCtxRelease", self._device)
