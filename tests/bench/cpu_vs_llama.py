"""CPU speed, ours and llama.cpp's in turn: python -m tests.bench.cpu_vs_llama BUILD GGUF LLAMA_BENCH

BUILD: an artifact of a checkpoint; GGUF: the same checkpoint converted by llama.cpp and quantised to the same bits;
LLAMA_BENCH: the llama-bench program. Rounds alternate; medians and their ratio are printed, with the bytes of a token
over its time as GB/s beside a read of memory timed in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).parent.parent.parent
RUN = """
import json, sys, time
import numpy as np
from qcn_compile import load
build, threads, prompt, new = sys.argv[1], *map(int, sys.argv[2:])
ids = np.random.default_rng(0).integers(0, 30000, prompt).tolist()
with load(build, threads=threads, context_length=prompt + new + 64, huge_pages=True, max_running_requests=1) as model:
    list(model.generate(ids[:8], temperature=1.0, seed=0, max_tokens=4, ignore_eos=True))
    last = None
    for piece in model.generate(ids, temperature=1.0, seed=0, max_tokens=new, ignore_eos=True):
        last = piece
    print(json.dumps({"prefill": last.timing.prefill_rate, "decode": last.timing.decode_rate}))
"""


@dataclass
class Series:
    """Tokens per second of one program over the rounds."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def ours(build: Path, threads: int, prompt: int, new: int) -> tuple[float, float]:
    """(prefill, decode) tokens per second; sampled tokens, so that every step routes to other experts."""
    run = subprocess.run([sys.executable, "-c", RUN, str(build), str(threads), str(prompt), str(new)],
                         capture_output=True, text=True, check=True, cwd=ROOT)
    data = json.loads(run.stdout.splitlines()[-1])
    return data["prefill"], data["decode"]


def theirs(program: Path, gguf: Path, threads: int, prompt: int, new: int) -> tuple[float, float]:
    """The same from llama-bench, one repetition."""
    run = subprocess.run([str(program), "-m", str(gguf), "-t", str(threads), "-p", str(prompt), "-n", str(new),
                          "-r", "1", "-o", "json"], capture_output=True, text=True, check=True)
    rows = json.loads(run.stdout)
    return (next(r["avg_ts"] for r in rows if r["n_prompt"]), next(r["avg_ts"] for r in rows if r["n_gen"]))


def read_bandwidth(threads: int, size: int = 1 << 30) -> float:
    """GB/s of summing a large array, one part a process: a lower bound of what the machine reads."""
    code = (f"import numpy as np, time\na = np.ones({size // threads // 8}, np.float64)\nbest = 0\n"
            "for _ in range(5):\n    t = time.perf_counter(); a.max(); "
            "best = max(best, a.nbytes / (time.perf_counter() - t))\nprint(best / 1e9)")
    jobs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(threads)]
    return sum(float(job.communicate()[0]) for job in jobs)


def active_bytes(build: Path) -> int:
    """Bytes a decoded token must move, as the plan counts them (weights, states, activations)."""
    plan = json.loads((build / "plan" / "main-decode-1.json").read_text())
    return sum(launch["bytes"] for launch in plan["launches"])


def report(build: Path, threads: int, mine: Series, other: Series, reads: list[float]) -> None:
    """One table per thread count."""
    bandwidth = active_bytes(build) * median(mine.decode) / 1e9
    print(f"\n{threads} thread{'s' if threads > 1 else ''}: memory read {median(reads):.1f} GB/s")
    print("            qcn-run   llama.cpp   ratio   (tokens/s, medians)")
    for name in ("prefill", "decode"):
        a, b = median(getattr(mine, name)), median(getattr(other, name))
        print(f"  {name:8} {a:9.1f} {b:11.1f} {a / b:7.2f}")
    print(f"  decode moves {active_bytes(build) / 1e6:.0f} MB a token: {bandwidth:.1f} GB/s, "
          f"{100 * bandwidth / median(reads):.0f} % of the read")


def main() -> None:
    """Parse, run the rounds, print."""
    top = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    top.add_argument("build", type=Path)
    top.add_argument("gguf", type=Path)
    top.add_argument("program", type=Path)
    top.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    top.add_argument("--rounds", type=int, default=3)
    top.add_argument("--prompt", type=int, default=512)
    top.add_argument("--new", type=int, default=96)
    args = top.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT,
                            check=False).stdout.strip()
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    print(f"{time.strftime('%Y-%m-%d')}, {cpu}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
          f"numpy {np.__version__}, commit {commit}")
    for threads in args.threads:
        mine, other, reads = Series(), Series(), []
        for _ in range(args.rounds):
            reads.append(read_bandwidth(threads))
            for series, (prefill, decode) in ((mine, ours(args.build, threads, args.prompt, args.new)),
                                              (other, theirs(args.program, args.gguf, threads, args.prompt, args.new))):
                series.prefill.append(prefill)
                series.decode.append(decode)
        report(args.build, threads, mine, other, reads)


if __name__ == "__main__":
    main()
