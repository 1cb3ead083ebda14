"""Collectives of real processes over shared memory: values, and every way in which a rank can be missing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qcn_compile.runtime.communicator import room
from qcn_compile.runtime.device import HostLibrary
from qcn_compile.targets.tvm.emit import build_host

SCRIPT = Path(__file__).with_name("rank_scenario.py")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("host")
    build_host(folder)
    return folder / "libqcnhost.so"


def start(library: Path, ranks: int, scenario: str, deadline: float = 20, only: list[int] | None = None
          ) -> list[subprocess.Popen[str]]:
    file = room(HostLibrary(library), ranks, 2 if scenario in ("stages", "cross") else None)
    try:
        return [subprocess.Popen([sys.executable, str(SCRIPT), str(library), str(file), str(rank), str(ranks),
                                  str(deadline), scenario], pass_fds=[file], stdout=subprocess.PIPE, text=True)
                for rank in only or range(ranks)]
    finally:
        os.close(file)


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    texts = [process.communicate(timeout=60)[0].strip() for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


@pytest.mark.parametrize(("scenario", "ranks"), [("values", 2), ("values", 5), ("same_bits", 3), ("stages", 4)])
def test_values(library: Path, scenario: str, ranks: int) -> None:
    assert ends(start(library, ranks, scenario)) == [(0, "")] * ranks


def test_ranks_in_different_collectives_end(library: Path) -> None:
    for code, text in ends(start(library, 3, "different")):
        assert (code, text) == (7, "the ranks came to different collectives: their plans do not belong together")


def test_stages_that_wait_for_each_other_end(library: Path) -> None:
    for code, text in ends(start(library, 4, "cross", deadline=1)):
        assert (code, text) in [(7, f"rank {other} did not come to collective 1 within 1 s") for other in (0, 1)] or (
            code, text) == (7, "the ranks came to different collectives: their plans do not belong together")


def test_a_rank_that_does_not_come_ends_the_others(library: Path) -> None:
    first, absent, last = ends(start(library, 3, "absent", deadline=1))
    assert absent == (0, "")
    assert first == last == (7, "rank 1 did not come to collective 1 within 1 s")


def test_ranks_end_with_their_parent(library: Path) -> None:
    """Rank 1 waits for rank 0, whose process (a shell that started it) is killed."""
    file = room(HostLibrary(library), 2)
    command = f"{sys.executable} {SCRIPT} {library} {file} 1 2 60 orphan > $1 & echo $! ; wait"
    log = library.parent / "orphan.txt"
    shell = subprocess.Popen(["sh", "-c", command, "sh", str(log)], pass_fds=[file], stdout=subprocess.PIPE, text=True)
    assert shell.stdout is not None
    shell.stdout.readline()
    time.sleep(1.5)
    shell.kill()
    shell.wait()
    os.close(file)
    deadline = time.monotonic() + 20
    while not log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert log.read_text().strip() == "rank 0 is gone"
