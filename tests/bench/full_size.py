"""Conversion at the sizes of Qwen3-Coder-Next: speed against the disk, peak memory, and a kill followed by a resume.

    python -m tests.bench.full_size audit                      names and shapes of all 48 layers, in sparse files
    python -m tests.bench.full_size convert --layers 2 --quant fp8     real files with random content, 3.3 GB a layer
    python -m tests.bench.full_size generated --quant int4 --layers 48     content made when read, output discarded

Run it on a quiet machine with room for the bf16 layers and their result; everything is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import qcn_compile
from qcn_compile.frontend import trace_model
from qcn_compile.frontend.checkpoint import locate
from qcn_compile.ir.types import DType
from qcn_compile.lowering.buckets import buckets_for
from qcn_compile.lowering.convert import convert, key_of, resumable, take
from qcn_compile.lowering.plan import blobs_of
from qcn_compile.lowering.schedule import schedule
from qcn_compile.lowering.weights import WeightFile, name_blobs, plan_files
from qcn_compile.passes.base import PassContext
from qcn_compile.pipeline import Pipeline
from qcn_compile.targets.base import Target
from qcn_compile.targets.registry import load_target
from tests.bench.random_checkpoint import make

CONFIG = Path(qcn_compile.__file__).parent / "assets/qwen3-coder-next/config.json"


def config(layers: int) -> dict[str, Any]:
    """The published configuration with that many layers."""
    return {**json.loads(CONFIG.read_text()), "num_hidden_layers": layers}


class Job:
    """The weight files of a checkpoint for a target and a format, as qcn-compile plans them."""

    def __init__(self, folder: Path, target: str, quant: str) -> None:
        self.target: Target = load_target(target)
        traced = trace_model(locate(str(folder), self.target.kind), DType(self.target.dtype))
        assert traced.weights is not None
        self.source = traced.weights
        activations = "int8" if self.target.kind == "cpu" else "f32"
        pipeline = Pipeline.default(base="bf16", quant=quant, activations=activations)
        graph = pipeline.run(traced.main, PassContext(target=self.target))
        keys = dict.fromkeys(k for bucket in buckets_for(self.target.kind)
                             for k in blobs_of(schedule(graph, bucket, self.target)))
        self.files: list[WeightFile] = plan_files(name_blobs(keys), self.target)

    def run(self, output: Path) -> dict[str, Any]:
        """Convert into `output`; digests, seconds (wall and processor) and bytes."""
        begin, busy = time.perf_counter(), time.process_time()
        with resumable(output, key_of(self.files, self.target, self.source.fingerprint())) as folder:
            written = convert(self.files, self.source, self.target, folder)
            take(written, folder, output)
        return {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - busy,
                "bytes": sum(f.nbytes for f in self.files), "sha256": dict(written.sha256), **peak()}


def peak() -> dict[str, float]:
    """Peak resident memory of this process so far, in GB. (What getrusage says includes the parent's at the fork.)"""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {"peak_gb": int(found[1]) * 1024 / 1e9 if found else 0.0}


def worker(folder: Path, output: Path, target: str, quant: str) -> None:
    """The process that converts and may be killed; prints one JSON object."""
    job = Job(folder, target, quant)
    traced = peak()["peak_gb"]
    print(json.dumps({**job.run(output), "traced_gb": traced}), flush=True)


def spawn(*args: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "tests.bench.full_size", "worker", *map(str, args)],
                            stdout=subprocess.PIPE, text=True)


def disk(folder: Path, file: Path) -> tuple[float, float]:
    """MB/s of reading `file` past the page cache, and of writing 1 GB down to the disk."""
    with file.open("rb", buffering=0) as handle:
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin, done, block = time.perf_counter(), 0, bytearray(8 << 20)
        while done < 1 << 30 and (count := handle.readinto(block)):
            done += count
        read = done / (time.perf_counter() - begin) / 1e6
    begin = time.perf_counter()
    with (folder / "disk-test").open("wb") as handle:
        for _ in range(128):
            handle.write(block)
        handle.flush()
        os.fsync(handle.fileno())
    write = (1 << 30) / (time.perf_counter() - begin) / 1e6
    (folder / "disk-test").unlink()
    return read, write


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that they are read from the disk."""
    os.sync()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def workplace(root: str | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="full-size-", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def convert_layers(args: argparse.Namespace) -> None:
    """Whole run, then a run killed at a random point and resumed."""
    with workplace(args.folder) as folder:
        size = make(folder / "model", config(args.layers), sparse=False)
        read, write = disk(folder, next((folder / "model").glob("*.safetensors")))
        forget(folder / "model")
        whole = json.loads(spawn(folder / "model", folder / "whole", args.target, args.quant).communicate()[0])
        rate = size / whole["seconds"] / 1e6
        print(f"{args.target} {args.quant}, {args.layers} layers, {size / 1e9:.2f} GB of bf16 into "
              f"{whole['bytes'] / 1e9:.2f} GB: {whole['seconds']:.1f} s, read {rate:.0f} MB/s, written "
              f"{whole['bytes'] / whole['seconds'] / 1e6:.0f} MB/s; disk alone: read {read:.0f}, write {write:.0f}")
        print(f"processor: {whole['cpu']:.1f} s, {size / whole['cpu'] / 1e6:.0f} MB of bf16 a second of one core")
        print(f"peak memory {whole['peak_gb']:.2f} GB, of it before the conversion {whole['traced_gb']:.2f} GB")
        shutil.rmtree(folder / "whole")
        process = spawn(folder / "model", folder / "again", args.target, args.quant)
        done = random.randrange(1, len(whole["sha256"]))
        while len(list(folder.glob(".again.weights/files/*.sha256"))) < done and process.poll() is None:
            time.sleep(0.05)
        time.sleep(random.uniform(0, 0.8) * whole["seconds"] / len(whole["sha256"]))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = len(list((folder / ".again.weights/files").glob("*.sha256")))
        resumed = json.loads(spawn(folder / "model", folder / "again", args.target, args.quant).communicate()[0])
        same = resumed["sha256"] == whole["sha256"]
        print(f"killed with {kept} of {len(whole['sha256'])} files done, resumed in {resumed['seconds']:.1f} s: "
              f"{'identical' if same else 'DIFFERENT'} bytes")
        assert same


def audit_all(args: argparse.Namespace) -> None:
    """All names and shapes through the audit."""
    with workplace(args.folder) as folder:
        size = make(folder / "model", config(48), sparse=True)
        used = sum(f.stat().st_blocks * 512 for f in (folder / "model").iterdir())
        begin = time.perf_counter()
        traced = trace_model(locate(str(folder / "model"), "gpu"), DType.bf16)
        print(f"{size / 1e9:.2f} GB in sparse files of {used / 1e6:.1f} MB: traced and audited in "
              f"{time.perf_counter() - begin:.1f} s, {peak()['peak_gb']:.2f} GB; {traced.audit}")


def main() -> None:
    from tests.bench.generated_layers import generated

    if sys.argv[1:2] == ["worker"]:
        worker(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["audit", "convert", "generated"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--target", default="h100")
    parser.add_argument("--quant", default="fp8")
    parser.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    args = parser.parse_args()
    {"audit": audit_all, "convert": convert_layers, "generated": generated}[args.what](args)


if __name__ == "__main__":
    main()
