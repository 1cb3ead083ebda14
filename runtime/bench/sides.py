"""The builds a benchmark compares: ours, another one, or the same one made by another revision in a git worktree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qcn_compile
from qcn_compile.artifact import read_plan
from qcn_compile.errors import DeviceError, UsageError

MEASURE = Path(__file__).with_name("measure.py")
ROOT = Path(qcn_compile.__file__).resolve().parents[1]
BUNDLED = "tiny-coder"
DTYPES = {"f32": "fp32", "bf16": "bf16"}


@dataclass(frozen=True)
class Side:
    """A build, the package that runs it, and what it is called in the table."""

    name: str
    build: Path
    root: Path = ROOT

    def environment(self) -> dict[str, str]:
        """Of a process that imports this side's package."""
        return {**os.environ, "PYTHONPATH": os.pathsep.join([str(self.root), os.environ.get("PYTHONPATH", "")])}

    def measure(self, job: dict[str, Any]) -> Any:
        """What measure.py prints for a job. Raises DeviceError with its last words."""
        return json.loads(self._run([str(MEASURE), str(self.build), json.dumps(job)]).splitlines()[-1])

    def end_to_end(self, job: dict[str, Any]) -> dict[str, float]:
        """A process from its start to its exit: a prompt in, `tokens` tokens out."""
        flags = ["-m", "qcn_compile.runtime.cli", str(self.build), "--prompt", "def fib(n):\n", "--json", "--seed", "0",
                 "--max-tokens", str(job["tokens"])]
        start = time.perf_counter()
        rows = [json.loads(line) for line in self._run([*flags, "--threads", str(job["threads"])]).splitlines()]
        seconds = time.perf_counter() - start
        last = rows[-1]
        return {"seconds": seconds, "load_ms": last["timing"]["load_ms"], "ttft_ms": last["timing"]["first_token_ms"],
                "tokens_per_second": last["timing"]["decode_tokens_per_second"],
                "tokens": last["usage"]["completion_tokens"], "peak_rss": last["peak_rss_bytes"]}

    def _run(self, words: list[str]) -> str:
        done = subprocess.run([sys.executable, *words], env=self.environment(), capture_output=True, text=True,
                              check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise DeviceError(f"{self.name} ({self.build}) could not be measured: {last[0]}")
        return done.stdout

    def plan(self, name: str) -> dict[str, int]:
        """Tokens and sequences that a plan holds, bytes and FLOPs that the compiler counted for it."""
        found = read_plan(self.build, f"plan/main-{name}.json")
        return {"tokens": found.tokens, "sequences": found.sequences,
                "bytes": sum(launch.bytes for launch in found.launches),
                "flops": sum(launch.flops for launch in found.launches)}


def commit(root: Path = ROOT) -> str:
    """Short hash of a checkout, with + when files differ; "" where there is no git."""
    done = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"],
                          capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


@contextmanager
def base(revision: str, build: Path, model: str | None) -> Iterator[Side]:
    """The same build made and run by another revision, in a worktree that is gone afterwards.

    Raises UsageError for a revision or model that is not there, DeviceError when it cannot build.
    """
    if not (ROOT / ".git").exists():
        raise UsageError("--base: this qcn-compile is installed, not a git checkout; use --vs BUILD instead")
    flags = build_flags(build, model)
    with tempfile.TemporaryDirectory(prefix="qcn-base-") as folder:
        tree = Path(folder) / "tree"
        done = subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(tree), revision],
                              capture_output=True, text=True, check=False)
        if done.returncode:
            raise UsageError(f"--base {revision}: {done.stderr.strip()}; name a commit, branch or tag")
        try:
            side = Side(f"{revision} ({commit(tree)})", Path(folder) / "build", tree)
            print(f"building with {revision}", file=sys.stderr)
            side._run(["-m", "qcn_compile.cli", "-o", str(side.build), *flags])
            yield side
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], capture_output=True,
                           check=False)


def build_flags(build: Path, model: str | None) -> list[str]:
    """The flags of qcn-compile that make a build like this one."""
    manifest = json.loads((build / "manifest.json").read_text(encoding="utf-8"))
    decided, name = manifest["decisions"], manifest["model"]["name"]
    if model is None and name != BUNDLED:
        raise UsageError(f"--base: {build} is of {name}; name its checkpoint with --model")
    flags = ["--model", model] if model is not None else []
    flags += ["--target", manifest["target"]["name"], "--quant", decided["format"], "--dtype", DTYPES[decided["base"]],
              "--context-length", str(decided["context_length"])]
    if decided["format"] != "none":
        flags += ["--activations", DTYPES.get(decided["activations"], "int8")]
    return flags
