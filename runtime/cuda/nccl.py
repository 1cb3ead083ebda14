"""NCCL's C functions through ctypes: sums, gathers and transfers of ranks, put into a stream (and so captured into a
graph)."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

from qcn_compile.errors import DeviceError

ID_BYTES = 128
TYPES = {"u8": 1, "i32": 2, "f32": 7, "bf16": 9}  # ncclDataType_t
SUM = 0
INSTALL = "pip install 'qcn-compile[nccl]'"


class UniqueId(ctypes.Structure):
    """What rank 0 makes and all ranks give."""

    _fields_ = [("data", ctypes.c_char * ID_BYTES)]


def library() -> Any:
    """libnccl.so.2: that of the Python package, else the system's. Raises DeviceError that says how to get it."""
    names = [*_packaged(), "libnccl.so.2"]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as problem:
            error = problem
    raise DeviceError(f"a build for several GPUs needs NCCL: {error}; {INSTALL}")


def _packaged() -> list[str]:
    try:
        found = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return []
    folders = found.submodule_search_locations if found is not None else None
    return [str(path) for folder in folders or () for path in Path(folder).glob("lib/libnccl.so.2")]


class Nccl:
    """One rank's communicator on the present CUDA context. The constructor returns when all ranks have called it."""

    def __init__(self, rank: int, ranks: int, unique: bytes, api: Any = None) -> None:
        self._api = library() if api is None else api
        self._api.ncclGetErrorString.restype = ctypes.c_char_p
        self._comm = ctypes.c_void_p()
        key = UniqueId()
        ctypes.memmove(ctypes.byref(key), unique, ID_BYTES)
        self._call("ncclCommInitRank", ctypes.byref(self._comm), ctypes.c_int(ranks), key, ctypes.c_int(rank))

    @staticmethod
    def unique_id(api: Any = None) -> bytes:
        """A new id, 128 bytes, for all ranks of one communicator."""
        found, key = library() if api is None else api, UniqueId()
        if found.ncclGetUniqueId(ctypes.byref(key)):
            raise DeviceError("ncclGetUniqueId failed; set NCCL_DEBUG=WARN to see why")
        return bytes(key)

    def all_reduce(self, x: int, y: int, count: int, dtype: str, stream: Any) -> None:
        """y = the sum over ranks of x, `count` elements at device addresses."""
        self._call("ncclAllReduce", ctypes.c_void_p(x), ctypes.c_void_p(y), ctypes.c_size_t(count),
                   ctypes.c_int(TYPES[dtype]), ctypes.c_int(SUM), self._comm, ctypes.c_void_p(int(stream)))

    def all_gather(self, x: int, y: int, count: int, dtype: str, stream: Any) -> None:
        """y = the x of all ranks, `count` elements each, one after the other."""
        self._call("ncclAllGather", ctypes.c_void_p(x), ctypes.c_void_p(y), ctypes.c_size_t(count),
                   ctypes.c_int(TYPES[dtype]), self._comm, ctypes.c_void_p(int(stream)))

    def send(self, x: int, count: int, dtype: str, to: int, stream: Any) -> None:
        """`count` elements at a device address go to a rank, which must call `recv` in its turn."""
        self._transfer("ncclSend", x, count, dtype, to, stream)

    def recv(self, y: int, count: int, dtype: str, source: int, stream: Any) -> None:
        """`count` elements of a rank's `send` come to a device address."""
        self._transfer("ncclRecv", y, count, dtype, source, stream)

    def _transfer(self, name: str, place: int, count: int, dtype: str, peer: int, stream: Any) -> None:
        self._call(name, ctypes.c_void_p(place), ctypes.c_size_t(count), ctypes.c_int(TYPES[dtype]), ctypes.c_int(peer),
                   self._comm, ctypes.c_void_p(int(stream)))

    def _call(self, name: str, *args: Any) -> None:
        code = getattr(self._api, name)(*args)
        if code:
            text = self._api.ncclGetErrorString(code)
            raise DeviceError(f"{name} failed: {text.decode() if text else code}; set NCCL_DEBUG=WARN to see why")
