"""Device memory that processes on several GPUs share: made by rank 0, handed on as file descriptors, mapped by all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcn_compile.runtime.cuda.driver import Driver

BLOCK = 2 << 20  # memory is made in whole blocks


def make_areas(driver: Driver, ranks: int, nbytes: int) -> list[int]:
    """One area on each of the first `ranks` GPUs; file descriptors to inherit. Raises DeviceError."""
    api, files = driver.api, []
    kind = api.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    for rank in range(ranks):
        what = api.CUmemAllocationProp()
        what.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        what.location = _on(api, rank)
        what.requestedHandleTypes = kind
        made = driver("cuMemCreate", nbytes, what, 0)
        files.append(int(driver("cuMemExportToShareableHandle", made, kind, 0)))
        driver("cuMemRelease", made)  # the descriptor keeps it
    return files


def map_areas(driver: Driver, rank: int, files: Sequence[int], nbytes: int) -> list[int]:
    """Addresses of all ranks' areas on the GPU of one. Raises DeviceError when it cannot reach another's memory."""
    api, addresses = driver.api, []
    kind = api.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    access = api.CUmemAccessDesc()
    access.location = _on(api, rank)
    access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    for file in files:
        made = driver("cuMemImportFromShareableHandle", file, kind)
        address = driver("cuMemAddressReserve", nbytes, 0, 0, 0)
        driver("cuMemMap", address, nbytes, 0, made, 0)
        driver("cuMemRelease", made)
        driver("cuMemSetAccess", address, nbytes, [access], 1)
        addresses.append(int(address))
    return addresses


def _on(api: Any, rank: int) -> Any:
    place = api.CUmemLocation()
    place.type, place.id = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE, rank
    return place
