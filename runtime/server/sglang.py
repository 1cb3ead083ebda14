"""Flags of SGLang's launch lines that mean nothing, or nothing yet, here: accepted or refused, each with its reason."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qcn_compile.errors import UsageError
from qcn_compile.runtime.rope import parse_overrides

COUNTS = {
    "dp": (("--dp", "--dp-size", "--data-parallel-size"), "data parallelism: start one server for each GPU"),
    "speculative_eagle_topk": (("--speculative-eagle-topk",), "a tree of drafts is not built yet; 1 is a chain"),
}
"""Numbers that may only be 1."""

IGNORED = {
    "attention_backend": (("--attention-backend",), "the build has its kernels"),
    "page_size": (("--page-size",), "pages are as long as the build's"),
    "mamba_scheduler_strategy": (("--mamba-scheduler-strategy", "--mamba-radix-cache-strategy"),
                                 "the prefix cache has one strategy"),
    "trust_remote_code": (("--trust-remote-code",), "no code of a checkpoint is ever run"),
    "enable_metrics": (("--enable-metrics",), "/metrics is always there"),
    "enable_cache_report": (("--enable-cache-report",), "cached tokens are always reported"),
}
"""Flags without effect."""
_STATES = {"float32": "f32", "bfloat16": "bf16"}  # SGLang's names and the manifest's
_SWITCHES = ("trust_remote_code", "enable_metrics", "enable_cache_report")


def add_sglang_flags(parser: argparse.ArgumentParser) -> None:
    """All of them, in one group."""
    g = parser.add_argument_group("SGLang's names, accepted so that launch lines run")
    for dest, (names, _) in COUNTS.items():
        g.add_argument(*names, type=int, default=1, dest=dest, metavar="N", help="1 only")
    g.add_argument("--json-model-override-args", default="{}", metavar="JSON",
                   help="over the model's config: rope_scaling (YaRN and others), rope_theta, max_position_embeddings")
    g.add_argument("--mamba-ssm-dtype", metavar="NAME", choices=("float32", "bfloat16"),
                   help="type of DeltaNet states: compiled in, so a build must have been made with the same")
    for dest, (names, reason) in IGNORED.items():
        if dest in _SWITCHES:
            g.add_argument(*names, dest=dest, action="store_true", default=None, help=f"no effect: {reason}")
        else:
            g.add_argument(*names, dest=dest, metavar="X", help=f"no effect: {reason}")


def check_sglang_flags(arguments: argparse.Namespace) -> None:
    """Raises UsageError for what is not there; says on stderr what has no effect."""
    for dest, (names, reason) in COUNTS.items():
        if (count := getattr(arguments, dest)) != 1:
            raise UsageError(f"{names[0]} {count}: {reason}")
    parse_overrides(arguments.json_model_override_args)
    for dest, (names, reason) in IGNORED.items():
        if getattr(arguments, dest) is not None:
            print(f"qcn-run: {names[0]} has no effect: {reason}", file=sys.stderr)


def check_state_type(build: Path, asked: str | None) -> None:
    """Raises UsageError when the build keeps its DeltaNet states in another type than `asked`."""
    if asked is None:
        return
    from qcn_compile.artifact import read_manifest

    found = {cache.dtype for cache in read_manifest(build).caches if cache.kind == "delta"}
    if found - {_STATES[asked]}:
        raise UsageError(f"--mamba-ssm-dtype {asked}: {build} keeps its states in {', '.join(sorted(found))}; build "
                         f"again with qcn-compile --mamba-ssm-dtype {asked}, or leave it out")
