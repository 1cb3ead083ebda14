"""Every layer of Qwen3-Coder-Next converted on a small disk: content is made when read, finished files are hollowed.

The checkpoint is sparse; a finished file keeps its digest and its size, not its content. One process is killed at a
random file and another resumes it; then some files are made again in an empty folder and their digests compared.
`python -m tests.bench.full_size generated` is the command.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from torch import Tensor

from qcn_compile.frontend.tensor_files import Stored, read_header
from qcn_compile.lowering.convert import convert, key_of, resumable
from qcn_compile.lowering.weights import WeightFile
from tests.bench.full_size import Job, config, disk, peak, workplace
from tests.bench.random_checkpoint import content, make

AT_ONCE = 4  # files that are converted before they are hollowed
AGAIN = 6  # files made once more at the end


def generated(args: argparse.Namespace) -> None:
    """Kill, resume, compare; one line each."""
    with workplace(args.folder) as folder:
        size = make(folder / "model", config(args.layers), sparse=True)
        counted = ask(folder, args, "count")
        count, traced = int(counted["files"]), counted["traced_cpu"]
        kill_after = random.randrange(1 + count // 8, count // 2)
        begin = time.perf_counter()
        first = start(folder, args, "convert")
        while len(finished(folder)) < kill_after and first.poll() is None:
            time.sleep(0.2)
        first.send_signal(signal.SIGKILL)
        usage, before = os.wait4(first.pid, 0)[2], finished(folder)
        cpu = usage.ru_utime + usage.ru_stime - traced
        print(f"killed with {len(before)} of {count} files done, {time.perf_counter() - begin:.0f} s, "
              f"{cpu:.0f} s of processor", flush=True)
        done = ask(folder, args, "convert")
        seconds, cpu = time.perf_counter() - begin, cpu + done["cpu"] - done["traced_cpu"]
        print(f"{args.target} {args.quant}, {args.layers} layers, {size / 1e9:.1f} GB of generated bf16 into "
              f"{done['bytes'] / 1e9:.1f} GB in {count} files: {seconds:.0f} s by the clock, "
              f"{size / seconds / 1e6:.0f} MB/s in; {cpu:.0f} s of processor, {size / cpu / 1e6:.0f} MB/s a core; "
              f"making content took {done['content']:.0f} s of the resumed {done['cpu'] - done['traced_cpu']:.0f}; "
              f"peak memory {done['peak_gb']:.2f} GB ({done['traced_gb']:.2f} before)", flush=True)
        _, write = disk(folder, next((folder / "model").glob("*.safetensors")))
        print(f"disk alone: write {write:.0f} MB/s", flush=True)
        early, late = range(kill_after + 1), range(kill_after + 1, count)
        again = ask(folder, args, "again", kill_after, *(number for part in (early, late) for number in
                                                         random.sample(part, min(AGAIN // 2, len(part)))))
        wrong = {name for name, digest in again["sha256"].items() if done["sha256"][name] != digest}
        print(f"{len(again['sha256'])} files made again: {'DIFFERENT ' + str(wrong) if wrong else 'identical digests'}")
        assert not wrong


def start(folder: Path, args: argparse.Namespace, what: str, *more: int) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "tests.bench.generated_layers", what, str(folder), args.target,
                             args.quant, *map(str, more)], stdout=subprocess.PIPE, text=True)


def ask(folder: Path, args: argparse.Namespace, what: str, *more: int) -> dict[str, Any]:
    process = start(folder, args, what, *more)
    answer = process.communicate()[0]
    assert process.returncode == 0, f"{what} ended with {process.returncode}"
    return dict(json.loads(answer))


def finished(folder: Path) -> list[Path]:
    return list((folder / ".out.weights/files").glob("*.sha256"))


class Content:
    """Stored tensors are made up when read; how long that takes, in processor seconds."""

    def __init__(self, model: Path) -> None:
        stored = {name: s for file in sorted(model.glob("*.safetensors")) for name, s in read_header(file).items()}
        self._names = {(s.file, s.span): name for name, s in stored.items()}
        self.seconds, self._lock = 0.0, Lock()
        Stored.read = lambda tensor, start=0, stop=None: self.read(tensor, start, stop)  # type: ignore[method-assign]

    def read(self, tensor: Stored, start: int, stop: int | None) -> Tensor:
        begin = time.thread_time()
        shape = ((tensor.shape[0] if stop is None else stop) - start, *tensor.shape[1:])
        made = content(f"{self._names[tensor.file, tensor.span]}:{start}", int(np.prod(shape))).reshape(shape)
        with self._lock:
            self.seconds += time.thread_time() - begin
        return made


def hollow(path: Path, size: int) -> None:
    """Give a file's content back to the disk; its size stays."""
    os.truncate(path, 0)
    os.truncate(path, size)


def convert_hollow(job: Job, files: list[WeightFile], folder: Path) -> dict[str, str]:
    """Convert what `folder` lacks, a few files at a time; name -> sha256."""
    digests: dict[str, str] = {}
    for at in range(0, len(files), AT_ONCE):
        some = files[at:at + AT_ONCE]
        digests |= convert(some, job.source, job.target, folder).sha256
        for file in some:
            hollow(folder / file.name, file.nbytes)
    return digests


def main() -> None:
    """A worker process: count | convert | again N..., FOLDER TARGET QUANT; prints one JSON object."""
    what, folder, target, quant = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    made = Content(folder / "model")
    job = Job(folder / "model", target, quant)
    answer: dict[str, Any] = {"files": len(job.files), "bytes": sum(f.nbytes for f in job.files),
                              "traced_gb": peak()["peak_gb"], "traced_cpu": time.process_time()}
    if what == "convert":
        with resumable(folder / "out", key_of(job.files, job.target, job.source.fingerprint())) as place:
            answer["sha256"] = convert_hollow(job, job.files, place)
    elif what == "again":
        files = [job.files[int(number)] for number in dict.fromkeys(sys.argv[5:])]
        answer["sha256"] = convert_hollow(job, files, folder / "again")
        shutil.rmtree(folder / "again")
    print(json.dumps({**answer, **peak(), "cpu": time.process_time(), "content": made.seconds}))


if __name__ == "__main__":
    main()
