"""A folder that appears whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcn_compile.errors import ArtifactError, UsageError


def check_output(output: Path, force: bool) -> None:
    """Raise UsageError for a path that holds something else than a build, unless it may be replaced."""
    if output.is_file() and not force:
        raise UsageError(f"{output} is a file: name a folder")
    if output.exists() and not force and not (output / "manifest.json").is_file() and any(output.iterdir()):
        raise UsageError(f"{output} exists and is no build of ours: name another folder or remove it")


@contextmanager
def building(output: Path, force: bool) -> Iterator[Path]:
    """A scratch directory beside `output` that takes its place on success and vanishes on any failure."""
    check_output(output, force)
    scratch = output.parent / f".{output.name}.partial-{os.getpid()}"
    for left in output.parent.glob(f".{glob.escape(output.name)}.partial-*"):
        if not alive(int(left.name.rpartition("-")[2])):
            shutil.rmtree(left, ignore_errors=True)
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        yield scratch
        _swap(scratch, output)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {output}: {error.strerror or error}; free space or name another folder with -o"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def alive(process: int) -> bool:
    """Whether a process of that number runs, whoever owns it."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _swap(scratch: Path, output: Path) -> None:
    old = output.parent / f".{output.name}.old-{os.getpid()}"
    if output.exists():
        output.rename(old)
    scratch.rename(output)
    shutil.rmtree(old, ignore_errors=True)
