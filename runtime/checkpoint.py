"""`qcn-run CHECKPOINT`: the compiler, run once as a process of its own, and the build it left in the cache folder."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from qcn_compile import settings
from qcn_compile.artifact import read_manifest
from qcn_compile.errors import QcnError, UsageError
from qcn_compile.runtime.speculation.options import MTP, speculative_algorithm

MANIFEST = "manifest.json"
INSTALL = "pip install 'qcn-compile[compile]'"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CPU_PACKAGES, _GPU_PACKAGES = ("torch", "transformers", "tvm"), ("torch", "transformers", "triton")
_GPUS = (("H100", "h100"), ("H200", "h200"), ("B200", "b200"), ("B300", "b300"), ("A100-SXM4-40GB", "a100-40"),
         ("A100", "a100"), ("L40S", "l40s"), ("RTX 4090", "rtx4090"), ("RTX 5090", "rtx5090"),
         ("RTX PRO 6000", "rtx-pro-6000"), ("GB10", "gb10"))


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """What the compiler is told when it is run from here."""
    g = parser.add_argument_group("when given a checkpoint instead of a build: compiled once, into a cache folder")
    g.add_argument("--target", metavar="NAME", help="as of qcn-compile (default: this machine's GPU, else cpu)")
    g.add_argument("--quantization", "--quant", metavar="NAME", help="--quant of qcn-compile (default: auto)")
    g.add_argument("--tp", "--tp-size", "--tensor-parallel-size", type=int, metavar="N", dest="tp",
                   help="--tp of qcn-compile; of a build, what it was made with")
    g.add_argument("--ep", "--ep-size", "--expert-parallel-size", type=int, metavar="M", dest="ep",
                   help="--ep of qcn-compile; of a build, what it was made with")
    g.add_argument("--pp", "--pp-size", "--pipeline-parallel-size", type=int, metavar="K", dest="pp",
                   help="--pp of qcn-compile; of a build, what it was made with")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder or Hugging Face name, and the flags to compile it with."""

    model: str
    flags: tuple[str, ...]

    @property
    def build(self) -> Path:
        """Where its build lies: another one for another model, other files, flags, processor or version."""
        parts = [*_files(Path(self.model)), *self.flags, version("qcn-compile"), _processor()]
        name = re.sub(r"[^\w.-]+", "--", self._short_name)
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return settings.cache_home() / "qcn-compile" / f"{name}-{digest[:16]}"

    @property
    def names(self) -> list[str]:
        """What clients may call it: as it was given, and its folder's name."""
        return list(dict.fromkeys((self.model, self._short_name)))

    @property
    def _short_name(self) -> str:
        folder = Path(self.model)
        return folder.resolve().name if folder.is_dir() else self.model

    def compile(self) -> None:
        """Make the build unless it is there. Raises UsageError without the compiler, QcnError when it fails."""
        build = self.build
        if (build / MANIFEST).is_file():
            return print(f"qcn-run: {self.model}: using the build {build}", file=sys.stderr)
        self._check_installed()
        with _lock(build):
            if not (build / MANIFEST).is_file():  # another process may have made it meanwhile
                self._run(build)
        return None

    def _run(self, build: Path) -> None:
        print(f"qcn-run: {self.model} is no build: compiling it into {build}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "qcn_compile.cli", "--model", self.model, "-o", str(build), *self.flags]
        code = subprocess.run(command, stdout=sys.stderr).returncode
        if code:
            error = QcnError(f"the compiler could not build {self.model} (its exit code is {code}; it said why above)")
            error.exit_code = code if 0 < code < 126 else 1
            raise error

    def _check_installed(self) -> None:
        wanted = _CPU_PACKAGES if "cpu" in self.flags else _GPU_PACKAGES
        missing = [name for name in wanted if importlib.util.find_spec(name) is None]
        if missing:
            raise UsageError(f"{self.model} is a checkpoint, and compiling it needs {', '.join(missing)}: {INSTALL}; "
                             "or compile it elsewhere with qcn-compile and give the build")


def find_checkpoint(arguments: argparse.Namespace) -> Checkpoint | None:
    """None for a build. With a checkpoint, `build` becomes its place in the cache, and the model's name what is served.

    `--model` stands for the first argument when that is missing, as in SGLang. Raises UsageError.
    """
    given = arguments.model if arguments.build is None else arguments.build
    if given is None:
        raise UsageError("give a build, a checkpoint's folder, or a Hugging Face name; see qcn-run --help")
    if arguments.build is None:
        arguments.build, arguments.model = given, None
    if not _is_checkpoint(given):
        for name in ("target", "quantization"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"--{name}: {given} is a build, which has its own; give a checkpoint, or build again")
        return None
    target = arguments.target or _this_gpu() or "cpu"
    flags = ["--target", target]
    if speculative_algorithm(arguments.speculative_algorithm) == MTP:
        flags.append("--mtp")
    if arguments.quantization is not None:
        flags += ["--quant", arguments.quantization]
    if arguments.mamba_ssm_dtype is not None:
        flags += ["--mamba-ssm-dtype", arguments.mamba_ssm_dtype]
    for name in ("tp", "ep", "pp"):
        if getattr(arguments, name) not in (None, 1):
            flags += [f"--{name}", str(getattr(arguments, name))]
    found = Checkpoint(str(given), tuple(flags))
    arguments.build = found.build
    arguments.served_model_name = arguments.served_model_name or found.names
    return found


def check_layout(build: Path, tp: int | None, ep: int | None, pp: int | None = None) -> None:
    """Raises UsageError when a build was made for other numbers of ranks than asked for."""
    if tp is None and ep is None and pp is None:
        return
    layout = read_manifest(build).layout
    for flag, asked in (("tp", tp), ("ep", ep), ("pp", pp)):
        have = int(layout.get(flag, 1))
        if asked is not None and asked != have:
            raise UsageError(f"--{flag} {asked}: {build} was built with --{flag} {have}; leave it out, or build again "
                             f"with qcn-compile --{flag} {asked}")


def _is_checkpoint(given: Path) -> bool:
    if given.is_dir():
        return (given / "config.json").is_file() and not (given / MANIFEST).exists()
    return not given.exists() and _HUB_NAME.fullmatch(str(given)) is not None


def _files(folder: Path) -> Sequence[str]:
    """What changes when a checkpoint does. A Hugging Face name stands for itself."""
    if not folder.is_dir():
        return [str(folder)]
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja"))
    return [str(folder.resolve()), *(f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)]


def _processor() -> str:
    """What a CPU build depends on: a cache folder may be shared between machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _this_gpu(folder: Path = Path("/proc/driver/nvidia/gpus")) -> str | None:
    """The target for this machine's first GPU, when there is one that we know."""
    files = sorted(folder.glob("*/information"))
    text = files[0].read_text(encoding="utf-8") if files else ""
    return next((target for name, target in _GPUS if name in text), None)


@contextmanager
def _lock(build: Path) -> Iterator[None]:
    """One compiler at a time for a build."""
    try:
        build.parent.mkdir(parents=True, exist_ok=True)
        file = build.with_name(build.name + ".lock").open("w")
    except OSError as error:
        raise UsageError(f"{build.parent}: {error.strerror or error}; set XDG_CACHE_HOME to a folder that can be "
                         "written to") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
