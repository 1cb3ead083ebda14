"""Conversion: weights are read, packed and written piece by piece on all cores; a file that is whole is never redone.

Finished files wait in a folder beside the build, each with its digest, under a key of everything their bytes depend on.
A build that was killed finds them there; one that failed or succeeded leaves nothing.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import qcn_compile
from qcn_compile import settings
from qcn_compile.artifact import file_sha256
from qcn_compile.errors import ArtifactError
from qcn_compile.ir.graph import Op, Value
from qcn_compile.ir.pieces import Piece
from qcn_compile.lowering.rows import Rows, Source
from qcn_compile.lowering.weights import BlobKey, WeightFile, cuts, pack_piece, part_bytes
from qcn_compile.targets.base import Target

Report = Callable[[int, int], None]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
IN_FLIGHT = 4  # pieces handed out for each worker
WAITING = 2  # whole files that are being flushed and hashed while the next ones are packed


@dataclass(frozen=True)
class Written:
    """File names in order, and the sha256 of each."""

    files: tuple[str, ...]
    sha256: Mapping[str, str]


def convert(files: list[WeightFile], source: Source, target: Target, folder: Path,
            report: Report | None = None, known: Mapping[Value, Piece] | None = None) -> Written:
    """Write the files that `folder` does not hold yet. `report(done, total)` counts bytes. `known`: as of `Rows`.

    Raises ArtifactError when the disk cannot hold them, before anything is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _reuse_memory()
    done = {file.name: digest for file in files if (digest := _finished(folder, file))}
    total, ready = sum(f.nbytes for f in files), sum(f.nbytes for f in files if f.name in done)
    _check_space(folder, total - ready)
    progress = _Progress(report, ready, total)
    jobs = settings.build_jobs()
    with ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool, \
            ThreadPoolExecutor(1) as closer:
        closing: list[tuple[str, Future[str]]] = []
        for file in files:
            if file.name in done:
                continue
            _write(file, folder, lambda value: Rows(value, source, known), target, pool, jobs * IN_FLIGHT, progress)
            closing.append((file.name, closer.submit(_finish, folder, file.name)))
            if len(closing) > WAITING:
                closing[-WAITING - 1][1].result()
        done |= {name: future.result() for name, future in closing}
    return Written(tuple(f.name for f in files), done)


def _reuse_memory() -> None:
    """Have glibc keep what a piece has freed for the next one: fresh pages cost more than the packing."""
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        tune(M_MMAP_THRESHOLD, 32 << 20)
        tune(M_TRIM_THRESHOLD, 512 << 20)


class _Progress:
    def __init__(self, report: Report | None, done: int, total: int) -> None:
        self._report, self._done, self._total = report or (lambda done, total: None), done, total
        self._report(done, total)

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self._report(self._done, self._total)


def _check_space(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise ArtifactError(f"cannot write {folder.parent}: No space left for the weights: they need "
                            f"{nbytes / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free; free some or name another "
                            "folder with -o")


def _write(file: WeightFile, folder: Path, rows_of: Callable[[Value], Rows], target: Target,
           pool: ThreadPoolExecutor, ahead: int, progress: _Progress) -> None:
    """All pieces of a file into NAME.part, in any order, no more than `ahead` of them at a time."""
    pending: list[Future[int]] = []
    with (folder / f"{file.name}.part").open("wb") as handle:
        os.truncate(handle.fileno(), file.nbytes)
        os.pwrite(handle.fileno(), file.header, 0)
        try:
            for key in file.keys:
                rows = rows_of(key.value)
                for cut in cuts(key, target):
                    pending.append(pool.submit(_piece, handle.fileno(), file, key, rows, cut, target))
                    if len(pending) >= ahead:
                        progress.add(pending.pop(0).result())
            while pending:
                progress.add(pending.pop(0).result())
        finally:
            for future in pending:  # the file stays open until nobody writes into it
                if not future.cancel():
                    future.exception()


def _piece(handle: int, file: WeightFile, key: BlobKey, rows: Rows, cut: tuple[int, int], target: Target) -> int:
    start = part_bytes(key, cut[0], target)
    written = 0
    for part, data in pack_piece(key, rows, cut, target).items():
        view, at = memoryview(data.data).cast("B"), file.offsets[key, part] + start[part]
        while view:
            count = os.pwrite(handle, view, at)
            view, at, written = view[count:], at + count, written + count
    return written


def _finish(folder: Path, name: str) -> str:
    """NAME.part on disk becomes NAME; its digest, written last, says that it is whole."""
    part = folder / f"{name}.part"
    with part.open("rb") as handle:
        os.fsync(handle.fileno())
    digest = file_sha256(part)
    part.rename(folder / name)
    _digest_file(folder, name).write_text(digest, encoding="utf-8")
    return digest


def _digest_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.sha256"


def _finished(folder: Path, file: WeightFile) -> str:
    """The digest of a file that an earlier run finished, or nothing."""
    digest, path = _digest_file(folder, file.name), folder / file.name
    if digest.is_file() and path.is_file() and path.stat().st_size == file.nbytes:
        return digest.read_text(encoding="utf-8") if digest.stat().st_size == 64 else ""
    return ""


@contextmanager
def resumable(output: Path, key: str) -> Iterator[Path]:
    """A folder beside `output` whose content survives a kill or an interrupt, and serves builds of the same key only.

    Raises ArtifactError when another process is at work on the same output.
    """
    folder = output.parent / f".{output.name}.weights"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ArtifactError(f"another qcn-compile is writing {output}; wait for it or name another folder "
                                "with -o") from None
        note = folder / "key"
        if not note.is_file() or note.read_text(encoding="utf-8") != key:
            shutil.rmtree(folder / "files", ignore_errors=True)
            note.write_text(key, encoding="utf-8")
        try:
            yield folder / "files"
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except BaseException:
            if not any((folder / "files").glob("*.sha256")):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def take(written: Written, folder: Path, into: Path) -> dict[str, str]:
    """Move finished files into a build (same file system); returns file name -> sha256."""
    into.mkdir(parents=True, exist_ok=True)
    for name in written.files:
        (folder / name).rename(into / name)
    return {name: written.sha256[name] for name in written.files}


def key_of(files: list[WeightFile], target: Target, origin: str) -> str:
    """A digest of all that the bytes depend on: how every blob is made, `origin` (the checkpoint), this compiler."""
    digest = hashlib.sha256(f"{_compiler()}|{origin}|{target.name}|{target.describe()}".encode())
    for file in files:
        digest.update(file.header)
        for key in file.keys:
            digest.update(f"{key.layout}|{key.encoding}|{expression(key.value)}".encode())
    return digest.hexdigest()


def expression(value: Value) -> str:
    """A static value as text."""
    op: Op | None = value.op
    if op is None:
        return value.name
    attrs = ",".join(f"{name}={attr!r}" for name, attr in sorted(op.attrs.items()))
    return f"{op.name}[{op.results.index(value)}]({','.join(map(expression, op.inputs))}){{{attrs}}}"


def _compiler() -> str:
    """A digest of the sources that decide how weights are packed."""
    root, digest = Path(qcn_compile.__file__).parent, hashlib.sha256()
    for path in sorted(p for part in ("ir", "lowering", "targets") for p in (root / part).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
