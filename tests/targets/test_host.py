"""The host library alone: threads, errors, fork, and what a kernel library needs of its surroundings."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from harness import Host, Lab, Program, Ragged, Trial
from host_abi import Any16, Launch

WORK = Program("pool work")
WORK.op("silu", [WORK.input("x", "f32[T,65]")])


@pytest.fixture
def host(lab: Lab) -> Iterator[Host]:
    """The shared host, left stopped."""
    yield lab.host
    lab.host.c.qcn_host_shutdown()
    lab.host.threads = 0


def launches(lab: Lab, repeat: int, seed: int = 0) -> tuple[object, Trial]:
    """A table that runs the pool program `repeat` times."""
    trial = Trial(WORK, Ragged((40,)), lab.target, np.random.default_rng(seed))
    (op, call), = lab.launches[WORK]
    launch = (call.kernel.symbol, [trial.address(op, r) for r in call.args])
    return lab.host.table(lab.library, [launch] * repeat), trial


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_many_regions_with_any_number_of_threads(lab: Lab, host: Host, threads: int) -> None:
    host.start(threads)
    rows, trial = launches(lab, 300)
    for _ in range(5):
        result = trial.buffers[WORK.ops[0].results[0]][1]
        result[...] = np.nan
        assert host.c.qcn_host_run(ctypes.byref(rows), len(rows), None) == 0
        got = trial.outcome()
        assert np.allclose(got.got[0], got.want[0], atol=1e-6)


def test_seconds_are_filled(lab: Lab, host: Host) -> None:
    host.start(2)
    rows, _ = launches(lab, 10)
    seconds = np.full(10, -1.0)
    assert host.c.qcn_host_run(ctypes.byref(rows), 10, seconds.ctypes.data) == 0
    assert (seconds >= 0).all()
    assert seconds.max() < 1


def test_stop_and_start_with_other_counts(lab: Lab, host: Host) -> None:
    for threads in (2, 1, 3, 2):
        host.start(threads)
        rows, _ = launches(lab, 3)
        assert host.c.qcn_host_run(ctypes.byref(rows), 3, None) == 0
    assert host.c.qcn_host_init(2, 0) == 0
    assert host.c.qcn_host_init(4, 0) != 0
    assert "shutdown" in host.error()
    assert host.c.qcn_host_init(0, 0) != 0


def test_callers_from_several_threads_take_turns(lab: Lab, host: Host) -> None:
    host.start(2)
    tables = [launches(lab, 50, seed) for seed in range(4)]
    failed: list[int] = []
    workers = [threading.Thread(target=lambda rows=rows: failed.append(
        host.c.qcn_host_run(ctypes.byref(rows), len(rows), None))) for rows, _ in tables]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failed == [0] * 4
    for _, trial in tables:
        done = trial.outcome()
        assert np.allclose(done.got[0], done.want[0], atol=1e-6)


def test_a_bad_argument_names_the_launch_and_the_reason(lab: Lab, host: Host) -> None:
    host.start(1)
    rows, _trial = launches(lab, 3)
    rows[1].n_args = 1
    assert host.c.qcn_host_run(ctypes.byref(rows), 3, None) == 2
    assert "TypeError" in host.error()
    rows[1].n_args = 3
    assert host.c.qcn_host_run(ctypes.byref(rows), 3, None) == 0
    assert host.error() == ""


def test_a_failing_task_fails_its_launch(tmp_path: Path, lab: Lab, host: Host) -> None:
    library = tmp_path / "bad.so"
    (tmp_path / "bad.c").write_text("""
        #include <stdint.h>
        int (*__TVMBackendParallelLaunch)(int (*)(int, void*, void*), void*, int);
        static int task(int id, void* group, void* closure) { return id == 1 ? -1 : 0; }
        int __tvm_ffi_bad(void* self, const void* args, int32_t n, void* result) {
          return __TVMBackendParallelLaunch(task, 0, 0);
        }""")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "bad.c"], check=True)
    for threads in (2, 3):
        host.start(threads)
        handle = host.load(library)
        rows = (Launch * 1)(Launch(host.c.qcn_host_symbol(handle, b"bad"), (Any16 * 1)(), 0, 0))
        assert host.c.qcn_host_run(ctypes.byref(rows), 1, None) == 1
        assert "without a message" in host.error()


def test_unknown_library_and_symbol(lab: Lab, host: Host) -> None:
    assert not host.c.qcn_host_load(b"/nowhere/libkernels.so")
    assert "/nowhere/libkernels.so" in host.error()
    assert not host.c.qcn_host_symbol(lab.library, b"no_such_kernel")


def test_run_before_init_is_an_error(lab: Lab, host: Host) -> None:
    host.c.qcn_host_shutdown()
    host.threads = 0
    rows, _ = launches(lab, 1)
    assert host.c.qcn_host_run(ctypes.byref(rows), 1, None) == 1
    assert "qcn_host_init" in host.error()


@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_must_start_its_own_threads(lab: Lab, host: Host) -> None:
    host.start(2)
    rows, _ = launches(lab, 2)
    child = os.fork()
    if child == 0:
        refused = host.c.qcn_host_run(ctypes.byref(rows), 2, None) == 1 and "fork" in host.error()
        again = host.c.qcn_host_init(2, 0) == 0 and host.c.qcn_host_run(ctypes.byref(rows), 2, None) == 0
        host.c.qcn_host_shutdown()
        os._exit(0 if refused and again else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert host.c.qcn_host_run(ctypes.byref(rows), 2, None) == 0


def test_pinning_is_undone(lab: Lab, host: Host) -> None:
    before = os.sched_getaffinity(0)
    assert host.c.qcn_host_init(2, 1) == 0
    assert len(os.sched_getaffinity(0)) == 1
    host.c.qcn_host_shutdown()
    assert os.sched_getaffinity(0) == before


LEAN = """
import ctypes, sys
folder, symbol = sys.argv[1:]
host = ctypes.CDLL(folder + "/libqcnhost.so")
host.qcn_host_load.restype = host.qcn_host_symbol.restype = ctypes.c_void_p
host.qcn_host_symbol.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
assert host.qcn_host_init(2, 0) == 0
library = host.qcn_host_load((folder + "/libkernels.so").encode())
assert library and host.qcn_host_symbol(library, symbol.encode())
maps = open("/proc/self/maps").read()
assert "tvm" not in maps and "torch" not in maps, maps
"""


def test_libraries_load_without_tvm(lab: Lab) -> None:
    symbol = lab.launches[WORK][0][1].kernel.symbol
    subprocess.run([sys.executable, "-c", LEAN, str(lab.folder), symbol], check=True)


def test_kernels_need_nothing_but_the_c_library(lab: Lab) -> None:
    lines = subprocess.run(["nm", "-D", "--undefined-only", lab.folder / "libkernels.so"], capture_output=True,
                           text=True, check=True).stdout.splitlines()
    needed = {line.split()[-1].split("@")[0] for line in lines}
    weak = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize", "__gmon_start__"}
    assert needed - weak <= {"cosf", "sinf", "sincosf", "memset", "memcpy", "memmove"}


def test_every_thread_reads_its_part(tmp_path: Path, host: Host) -> None:
    """The bytes arrive, and each thread of the pool is the first to touch about its share of the pages."""
    data = np.random.default_rng(0).integers(0, 256, (48 << 20) + 123, dtype=np.uint8)
    (tmp_path / "blob").write_bytes(data.tobytes())
    host.start(3)
    memory = mmap.mmap(-1, len(data), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    into = np.frombuffer(memory, np.uint8)
    before = faults()
    with (tmp_path / "blob").open("rb") as file:
        assert host.c.qcn_host_read(file.fileno(), 7, into.ctypes.data, len(data) - 7) == 0
        touched = sorted(count - before.get(thread, 0) for thread, count in faults().items())[-3:]
        assert np.array_equal(into[:len(data) - 7], data[7:])
        assert min(touched) > 0.8 * len(data) / 3 / mmap.PAGESIZE, touched
        assert host.c.qcn_host_read(file.fileno(), 7, into.ctypes.data, len(data)) == 1
        assert "the file has ended" in host.error()


def faults() -> dict[str, int]:
    """Pages that each thread of this process was the first to touch."""
    return {task.name: int((task / "stat").read_text().rsplit(")", 1)[1].split()[7])
            for task in Path("/proc/self/task").iterdir()}


def test_tasks_run_by_place(tmp_path: Path, host: Host) -> None:
    """Task i of n belongs to thread i * threads / n: where all threads are at work, it runs there."""
    library = tmp_path / "place.so"
    (tmp_path / "place.c").write_text("""
        #include <stdint.h>
        #include <sys/syscall.h>
        #include <unistd.h>
        int (*__TVMBackendParallelLaunch)(int (*)(int, void*, void*), void*, int);
        int owners[64], tasks;
        static int task(int id, int* group, void* closure) {
          owners[id] = (int)syscall(SYS_gettid);
          tasks = group[2];
          usleep(3000);
          return 0;
        }
        int __tvm_ffi_place(void* self, const void* args, int32_t n, void* result) {
          return __TVMBackendParallelLaunch((void*)task, 0, 0);
        }""")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "place.c"], check=True)
    host.start(3)
    handle = host.load(library)
    rows = (Launch * 1)(Launch(host.c.qcn_host_symbol(handle, b"place"), (Any16 * 1)(), 0, 0))
    assert host.c.qcn_host_run(ctypes.byref(rows), 1, None) == 0
    loaded = ctypes.CDLL(str(library))
    owners = list((ctypes.c_int * 64).in_dll(loaded, "owners"))[:ctypes.c_int.in_dll(loaded, "tasks").value]
    assert len(owners) == 24
    stretches = [owners[start:start + 8] for start in (0, 8, 16)]
    assert [len(set(part[:6])) for part in stretches] == [1, 1, 1], owners  # the last ones may be taken by who is done
    assert len({part[0] for part in stretches}) == 3, owners


def test_what_a_region_costs(host: Host) -> None:
    host.c.qcn_host_region_seconds.restype = ctypes.c_double
    assert host.c.qcn_host_region_seconds(10) == -1 and "qcn_host_init first" in host.error()
    for threads in (1, 2):
        host.start(threads)
        assert 0 < host.c.qcn_host_region_seconds(200) < 0.01


def test_pinned_threads_have_a_core_each_until_shutdown(lab: Lab, host: Host) -> None:
    """The thread that runs regions is bound, wherever the pool was started; all are free again afterwards."""
    cores, seen = sorted(os.sched_getaffinity(0)), []
    rows, _ = launches(lab, 1)

    def run() -> None:
        assert host.c.qcn_host_run(ctypes.byref(rows), 1, None) == 0
        seen.append(os.sched_getaffinity(0))

    assert host.c.qcn_host_init(2, 1) == 0
    assert os.sched_getaffinity(0) == {cores[0]}
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert seen == [{cores[0]}] * 2 and os.sched_getaffinity(0) == set(cores)
    bound = [os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()]
    assert {cores[1 % len(cores)]} in bound
    run()
    host.c.qcn_host_shutdown()
    assert os.sched_getaffinity(0) == set(cores)
