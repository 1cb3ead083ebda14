"""The CPU as a device: host library and its thread pool, kernel symbols, aligned memory, one call a step."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from qcn_compile.errors import ArtifactError, CapacityError, DeviceError, UsageError

HUGE_PAGE = 2 << 20
POINTER = 4  # QcnAny.type_index of a pointer
ANY = np.dtype([("type_index", "<i4"), ("padding", "<i4"), ("pointer", "<u8")])
LAUNCH = np.dtype([("function", "<u8"), ("args", "<u8"), ("n_args", "<i4"), ("reserved", "<i4")])
CPUINFO = Path("/proc/cpuinfo")
PROCESSOR_FLAGS = {"avx2": ("avx2", "fma", "f16c"), "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
                   "vnni": ("avx512_vnni",), "avxvnni": ("avx_vnni",),
                   "neon": ("asimd",), "dotprod": ("asimddp",)}  # features of a manifest -> flags of Linux
ARM_FLAGS, HWCAP = {1: "asimd", 20: "asimddp"}, 16  # bits of Linux's AT_HWCAP on 64-bit Arm
_NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux: caches are reserved whole and touched as they fill


_COLLAPSE = 25  # MADV_COLLAPSE, Linux 6.1


def allocate(nbytes: int) -> np.ndarray:
    """Zeroed private memory, u8 [nbytes], 64-byte aligned; on 2 MiB boundaries with huge pages asked for when large.

    Nothing is touched, so it costs address space only. Raises CapacityError when the system refuses.
    """
    size = max(nbytes, 64)
    slack = HUGE_PAGE if size >= HUGE_PAGE else 0
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    try:
        memory = mmap.mmap(-1, size + slack, flags=flags)
    except (OSError, OverflowError) as error:
        raise CapacityError(f"cannot reserve {size / 1e9:.2f} GB of memory ({error}); "
                            "use a smaller --context-length or --max-running-requests") from None
    if slack:
        _ask_for_huge_pages(memory)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE if slack else 0
    return whole[start:start + nbytes]


def _ask_for_huge_pages(memory: mmap.mmap) -> None:
    with suppress(OSError):  # a kernel without transparent huge pages: slower, not wrong
        memory.madvise(mmap.MADV_HUGEPAGE)


def collapse(array: np.ndarray) -> None:
    """Ask once more for huge pages below memory that is filled: the first touch does not wait until there are some."""
    start = -(-address(array) // HUGE_PAGE) * HUGE_PAGE
    size = (address(array) + array.nbytes - start) // HUGE_PAGE * HUGE_PAGE
    if size > 0:  # an older kernel refuses: slower, not wrong
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _COLLAPSE)


def check_processor(target: Mapping[str, Any]) -> None:
    """Raises ArtifactError when this processor lacks what the build's kernels use, before they can trap."""
    flags = processor_flags()
    lacking = lacked(str(target.get("features", "")), flags) if flags else []
    if lacking:
        raise ArtifactError(f"the build was made for {target.get('mcpu')}, this processor lacks {', '.join(lacking)}; "
                            "build again here, or with --mcpu naming this processor")


def processor_flags() -> frozenset[str]:
    """Flags of this processor as Linux names them; empty where it tells none."""
    if platform.machine() == "aarch64":
        bits = ctypes.CDLL(None).getauxval(ctypes.c_ulong(HWCAP))
        return frozenset(flag for bit, flag in ARM_FLAGS.items() if bits >> bit & 1)
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.is_file() else []
    return next((frozenset(line.split(":")[1].split()) for line in lines if line.startswith("flags")), frozenset())


def lacked(features: str, flags: frozenset[str]) -> list[str]:
    """Of features named in a manifest, those that are not among the flags."""
    return [name for name in features.split() if not flags.issuperset(PROCESSOR_FLAGS.get(name, (name,)))]


def usable(libraries: Sequence[str], target: Mapping[str, Any], flags: frozenset[str]) -> list[str]:
    """The libraries of a build without the variants that this processor cannot run, and but the first that it can."""
    variants = {f"kernels/libkernels-{name}.so": str(needs) for name, needs in target.get("variants", {}).items()}
    found = [name for name in libraries if name in variants and not lacked(variants[name], flags)]
    return [name for name in libraries if name not in variants or name in found[:1]]


def address(array: np.ndarray) -> int:
    """Where an array's data starts."""
    return int(array.ctypes.data)


_named: dict[tuple[int, int], str] = {}


def by_inode(library: Path) -> Path:
    """A name for dlopen that no other file ever had: it takes a known path for the library it knows, even when the
    folder was built anew. The file stays open with the process, as the library does."""
    try:
        status = library.stat()
        key = (status.st_dev, status.st_ino)
        if key not in _named:
            _named[key] = f"/proc/self/fd/{os.open(library, os.O_RDONLY)}"
    except OSError:
        return library
    return Path(_named[key]) if os.path.exists(_named[key]) else library


class HostLibrary:
    """`libqcnhost.so`: loads kernel libraries and runs launch tables on its thread pool."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = library = ctypes.CDLL(str(by_inode(path)))
        except OSError as error:
            raise ArtifactError(f"cannot load {path}: {error}; it was built for another system: "
                                "build again with qcn-compile for this machine") from None
        pointer, integer, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
        try:
            self._init = self._bind(library.qcn_host_init, integer, integer, integer)
            self._shutdown = self._bind(library.qcn_host_shutdown, None)
            self._load = self._bind(library.qcn_host_load, pointer, text)
            self._symbol = self._bind(library.qcn_host_symbol, pointer, pointer, text)
            self.run = self._bind(library.qcn_host_run, integer, pointer, integer, pointer)
            self._error = self._bind(library.qcn_host_error, text)
            long = ctypes.c_int64
            self.read = self._bind(library.qcn_host_read, integer, integer, long, pointer, long)
            self.region = self._bind(library.qcn_host_region_seconds, ctypes.c_double, integer)
        except AttributeError as error:
            raise ArtifactError(f"{path} is no host library of this version: {error}; build again") from None

    def bind_ranks(self) -> None:
        """Bind what builds for several ranks use (ranks.c)."""
        library, pointer, integer, long = self._library, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        try:
            self.ranks_bytes = self._bind(library.qcn_ranks_bytes, long, integer, long)
            self.ranks_fail = self._bind(library.qcn_ranks_fail, None, pointer, ctypes.c_char_p)
            self.ranks_collective = self._bind(library.qcn_ranks_collective, integer, pointer, integer, pointer,
                                               pointer, long, long)
            self.ranks_launch = int(ctypes.cast(library.qcn_ranks_launch, pointer).value or 0)
        except AttributeError as error:
            raise ArtifactError(f"the host library knows no ranks: {error}; build again with qcn-compile") from None

    @staticmethod
    def _bind(function: Any, result: Any, *arguments: Any) -> Any:
        function.restype, function.argtypes = result, list(arguments)
        return function

    def error(self) -> str:
        """The library's last message."""
        return (self._error() or b"no reason given").decode("utf-8", "replace")

    def start(self, threads: int, pin: bool) -> None:
        if self._init(threads, int(pin)) != 0:
            raise DeviceError(f"the thread pool of {threads} threads did not start: {self.error()}")

    def stop(self) -> None:
        self._shutdown()

    def load(self, path: Path) -> int:
        handle = self._load(str(by_inode(path)).encode())
        if not handle:
            raise ArtifactError(f"cannot load {path}: {self.error()}; it was built for another system: "
                                "build again with qcn-compile for this machine")
        return int(handle)

    def symbol(self, library: int, name: str) -> int:
        """Address of a kernel, 0 when the library has none of that name."""
        return int(self._symbol(library, name.encode()) or 0)


_pools: dict[tuple[int, int], list[int]] = {}  # (device, inode) of a host library -> [users, threads]: dlopen shares it


class CpuDevice:
    """The libraries of one build, loaded. Host library first, then kernels; the thread pool is shared per library.

    Raises ArtifactError for libraries that do not load, UsageError when the pool runs with other threads already.
    """

    def __init__(self, build: Path, libraries: Sequence[str], threads: int, pin: bool = False) -> None:
        if not libraries:
            raise ArtifactError(f"{build} lists no libraries: it was built for the null target, which runs nothing")
        self.threads = threads
        self.host = self._host = HostLibrary((build / libraries[0]).resolve())
        status = os.stat(build / libraries[0])
        self._key = (status.st_dev, status.st_ino)
        users = _pools.get(self._key)
        if users is None:
            self._host.start(threads, pin)
            users = _pools[self._key] = [0, threads]
        elif users[1] != threads:
            raise UsageError(f"{build} is open in this process with {users[1]} threads; close it or ask for as many")
        users[0] += 1
        self._open = True
        try:
            self._kernels = [self._host.load((build / name).resolve()) for name in libraries[1:]]
        except ArtifactError:
            self.close()
            raise

    def __str__(self) -> str:
        return f"{self.threads} threads"

    def symbol(self, name: str) -> int:
        """Address of a kernel in any of the libraries. Raises ArtifactError when none has it."""
        for library in self._kernels:
            if found := self._host.symbol(library, name):
                return found
        raise ArtifactError(f"no library of the build has the kernel {name}; build again with qcn-compile")

    def run(self, table: np.ndarray, seconds: np.ndarray | None = None) -> int:
        """Run a LAUNCH table. Returns the index of the launch that failed, or -1. seconds: f64 [launches] out."""
        if not self._open:
            raise UsageError("the model is closed; load it again")
        return int(self._host.run(address(table), len(table), None if seconds is None else address(seconds))) - 1

    def error(self) -> str:
        return self._host.error()

    def read(self, file: int, at: int, into: np.ndarray) -> None:
        """Fill u8 `into` with a file's bytes from `at` on, every thread its part: memory then lies near the thread that
        computes with it, where threads are pinned. Raises OSError when the file ends or cannot be read."""
        if self._host.read(file, at, address(into), into.nbytes) != 0:
            raise OSError(self._host.error())

    def region_seconds(self, count: int = 2000) -> float:
        """What an empty parallel region costs, a mean."""
        return float(self._host.region(count))

    def close(self) -> None:
        """Stop the pool when its last user leaves. Calling twice is fine."""
        if not self._open:
            return
        self._open = False
        users = _pools[self._key]
        users[0] -= 1
        if users[0] == 0:
            del _pools[self._key]
            self._host.stop()
