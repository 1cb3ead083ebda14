"""Decode and prefill on this CPU, ours beside llama.cpp's and transformers': qcn-bench cpu --vs llama.cpp

A random model with the layer shapes of Qwen3-Coder-Next (bench_config.json) is written once and built for every side:
int4 and int8 by qcn-compile, Q4_0 and Q8_0 through the gguf package; llama.cpp comes from llama-cpp-python, compiled
here in an environment of its own. The sides take turns. Printed are medians, their ratio, the bytes of a token against
a read of memory in the same rounds, and resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from qcn_compile.runtime.bench.local import machine
from qcn_compile.runtime.bench.probe import roof
from qcn_compile.runtime.bench.sides import ROOT

HERE = Path(__file__).parent
PEERS = {"int4": "q4_0", "int8": "q8_0", "none": "bf16"}  # our formats, and llama.cpp's of the same bits
Measure = Callable[[int], dict[str, float]]  # threads -> rates in tokens/s, memory in bytes


@dataclass
class Side:
    """One program on one format, and what it gave in each round."""

    name: str
    measure: Measure
    rounds: list[dict[str, float]] = field(default_factory=list)

    def median(self, key: str) -> float:
        return median(r[key] for r in self.rounds)


class Workplace:
    """What the sides need, made once in a folder: checkpoint, llama.cpp's environment, builds, GGUF files."""

    def __init__(self, folder: Path, prompt: int, new: int, under: Sequence[str] = (), layers: int = 0) -> None:
        self.folder, self.lengths, self.under, self.layers = folder, [str(prompt), str(new)], under, layers
        folder.mkdir(parents=True, exist_ok=True)

    def made(self, name: str, *command: str | Path, **environment: str) -> Path:
        """folder/name, by running the command with the path behind it unless it is there. A failure leaves nothing."""
        path, unfinished = self.folder / name, self.folder / f"unfinished-{name}"
        if not path.exists():
            print(f"making {path}", file=sys.stderr, flush=True)
            subprocess.run(["rm", "-rf", str(unfinished)], check=True)
            subprocess.run([*map(str, command), str(unfinished)], check=True, cwd=ROOT, stdout=sys.stderr,
                           env={**os.environ, **environment})
            unfinished.rename(path)
        return path

    def checkpoint(self) -> Path:
        config = json.loads((HERE / "bench_config.json").read_text())
        file = self.folder / "config.json"
        file.write_text(json.dumps({**config, "num_hidden_layers": self.layers or config["num_hidden_layers"]}))
        return self.made("checkpoint", sys.executable, "-m", "tests.bench.random_checkpoint", file)

    def python(self) -> Path:
        """The interpreter that has llama-cpp-python, compiled for this processor."""
        python = self.made("llama", sys.executable, "-m", "venv") / "bin/python"
        self.made("llama.built", "sh", "-c", f"{python} -m pip install -q --no-binary llama-cpp-python "
                  "llama-cpp-python gguf numpy && touch $0", CMAKE_ARGS="-DGGML_NATIVE=ON")
        return python

    def build(self, format_: str) -> Path:
        return self.made(f"build-{format_}", sys.executable, "-m", "qcn_compile.cli", "--model", self.checkpoint(),
                         "--quant", format_, "--context-length", "4096", "-o")

    def gguf(self, format_: str) -> Path:
        return self.made(f"{format_}.gguf", self.python(), HERE / "llama/write_gguf.py", self.checkpoint(), format_)

    def ours(self, format_: str) -> Side:
        command = [sys.executable, HERE / "our_speed.py", self.build(format_)]
        return Side(f"qcn-run {format_}", lambda threads: self._run([*command, str(threads)]))

    def llama(self, format_: str) -> Side:
        command = [self.python(), HERE / "llama/speed.py", self.gguf(format_)]
        return Side(f"llama.cpp {format_}", lambda threads: self._run([*command, str(threads)]))

    def transformers(self) -> Side:
        command = [sys.executable, HERE / "eager_speed.py", self.checkpoint()]
        return Side("transformers bf16", lambda threads: self._run([*command, str(threads)]))

    def _run(self, command: Sequence[str | Path]) -> dict[str, float]:
        done = subprocess.run([*self.under, *map(str, command), *self.lengths], capture_output=True, text=True,
                              check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        if done.returncode:
            raise SystemExit(f"{command[1]} failed: {done.stderr.strip()[-500:]}")
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found


def compare(sides: Sequence[Side], threads: int, rounds: int, under: Sequence[str] = ()) -> dict[str, Any]:
    """Rounds in turns, and a read of memory (`under` a command) in each. The first side is ours."""
    reads = []
    for side in sides:
        side.rounds.clear()
    for _ in range(rounds):
        reads.append(roof(threads, under)["read"])
        for side in sides:
            side.rounds.append(side.measure(threads))
    rows = []
    for side in sides:
        row: dict[str, Any] = {key: side.median(key) for key in ("prefill", "decode", "rss", "weights")}
        if "bytes" in side.rounds[0]:
            row["gb_per_second"] = side.median("bytes") * row["decode"] / 1e9
            row["of_read"] = row["gb_per_second"] / median(reads)
        row["decodes"] = [r["decode"] for r in side.rounds]
        rows.append({"name": side.name, **row, "ratios": {key: sides[0].median(key) / row[key]
                                                          for key in ("prefill", "decode")}})
    region = {"region": sides[0].median("region")} if "region" in sides[0].rounds[0] else {}
    return {"threads": threads, "rounds": rounds, "read": median(reads), "reads": reads, **region, "sides": rows}


def table(found: dict[str, Any]) -> list[str]:
    """The comparison as text."""
    first = f"{found['threads']} thread(s), medians of {found['rounds']} rounds, memory read {found['read']:.1f} GB/s"
    first += f" ({min(found['reads']):.1f}-{max(found['reads']):.1f})"
    if "region" in found:
        first += f", an empty parallel region {1e6 * found['region']:.2f} us"
    lines = [first,
             f"  {'':18} {'prefill':>8} {'ratio':>6} {'decode':>8} {'ratio':>6}  tokens/s"]
    for row in found["sides"]:
        rates = "".join(f" {row[key]:8.1f} {row['ratios'][key]:6.2f}" for key in ("prefill", "decode"))
        spread = f"({min(row['decodes']):.1f}-{max(row['decodes']):.1f})"
        line = f"  {row['name']:18}{rates}  {spread}; "
        line += f"resident {row['rss'] / 1e6:.0f} MB, weights {row['weights'] / 1e6:.0f} MB"
        if "of_read" in row:
            line += f"; {row['gb_per_second']:.1f} GB/s, {100 * row['of_read']:.0f} % of the read"
        lines.append(line)
    return lines


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="qcn-bench cpu", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--vs", nargs="+", choices=("llama.cpp", "transformers"), default=["llama.cpp"])
    p.add_argument("--format", nargs="+", choices=tuple(PEERS), default=["int4", "int8"],
                   help="of our builds; llama.cpp gets Q4_0, Q8_0 or BF16 (default: int4 int8)")
    p.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--new", type=int, default=96)
    p.add_argument("--under", type=shlex.split, default=[], metavar="COMMAND",
                   help="what each timed program is started by, for example 'chrt -f 30' where other jobs run")
    p.add_argument("--layers", type=int, default=0, help="of the model, in a new folder (default: 12)")
    p.add_argument("--folder", type=Path, help="where to work, kept for the next run; else a temporary one (12 GB)")
    p.add_argument("--json", action="store_true")
    return p.parse_args()


def main() -> None:
    """Make what is missing, run the rounds, print."""
    args = arguments()
    with ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qcn-cpu-")))
        place = Workplace(folder.absolute(), args.prompt, args.new, args.under, args.layers)
        groups = []
        for format_ in args.format:
            others = {"llama.cpp": lambda f=format_: place.llama(PEERS[f]), "transformers": place.transformers}
            groups.append([place.ours(format_), *(others[peer]() for peer in args.vs)])
        about = machine(max(args.threads))
        if not args.json:
            print(", ".join(f"{key} {value}" for key, value in about.items() if key != "threads"), flush=True)
        for threads in args.threads:
            for sides in groups:
                found = compare(sides, threads, args.rounds, args.under)
                print(json.dumps({**about, **found}) if args.json else "\n".join(table(found)), flush=True)


if __name__ == "__main__":
    main()
