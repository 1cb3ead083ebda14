"""What a command line gets wrong, told before torch, transformers or TVM are imported."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from qcn_compile import settings
from qcn_compile.artifact import check_output
from qcn_compile.errors import ModelError, UsageError
from qcn_compile.planning.model import find_config
from qcn_compile.targets.choices import check_choices
from qcn_compile.targets.registry import chip_to_build

PLUGINS = "qcn_compile.plugins"  # group of entry points
HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
NAME = re.compile(r'^    name: ClassVar\[str\] = "([\w-]+)"', re.M)


def check(args: argparse.Namespace, output: Path) -> None:
    """Raise a QcnError for flags of qcn-compile that cannot work, as far as that needs no compiler."""
    chip = chip_to_build(args.target)
    kind = "null" if args.target == "null" else chip.kind
    check_choices(kind, args.target, args.dtype, args.quant, args.activations)
    check_plugins(args.plugin)
    check_passes(filter(None, [*{args.print_ir_after} - {"all"}, args.stop_after, *args.disable_pass]), args.plugin)
    check_output(output, args.force)
    if args.model is not None:
        check_model(args.model)
    if args.model is None or Path(args.model).expanduser().is_dir() or settings.offline():
        _, config = find_config(args.model, "cpu" if kind == "null" else kind)
        check_context(args.context_length, config.get("max_position_embeddings"))


def check_model(model: str) -> None:
    """Raise ModelError for what is neither a folder nor a name; the compiler looks for the latter."""
    path = Path(model).expanduser()
    if path.is_file():
        raise ModelError(f"{model} is a file; give the directory that holds config.json and the *.safetensors files")
    if not path.is_dir() and not HUB.fullmatch(model):
        raise ModelError(f"{model!r} is no directory, and no Hugging Face name of the form owner/model")


def check_context(asked: int | None, longest: int | None) -> None:
    """Raise UsageError for a --context-length that the model cannot have; `longest` may be unknown."""
    if asked is not None and longest is not None and asked > longest:
        raise UsageError(f"--context-length {asked}: the model was made for at most {longest} tokens; "
                         f"ask for {longest} or less")
    if asked is not None and asked < 1:
        raise UsageError(f"--context-length {asked}: must be at least 1")


def check_plugins(files: Iterable[Path]) -> None:
    """Raise UsageError for a --plugin that is not there."""
    for file in files:
        if not file.is_file():
            raise UsageError(f"--plugin {file}: no such file; give a Python file")


def check_passes(names: Iterable[str], plugins: Sequence[Path]) -> None:
    """Raise UsageError for a pass that nobody has; with plugins, which may bring it, only their loading tells."""
    if plugins or entry_points(group=PLUGINS):
        return
    known = pass_names()
    for name in names:
        if name not in known:
            raise UsageError(f"no pass named {name!r}; known: {', '.join(known)}")


def pass_names() -> list[str]:
    """Names of our own passes, read from their files: importing them takes the compiler."""
    spec = find_spec("qcn_compile.passes")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    return sorted(name for file in folder.glob("*.py") for name in NAME.findall(file.read_text(encoding="utf-8")))
