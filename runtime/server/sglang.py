"""Flags of SGLang's launch lines that mean nothing, or nothing yet, here: accepted or refused, each with its reason."""

from __future__ import annotations

import argparse
import json
import sys

from qcn_compile.errors import UsageError

COUNTS = {
    "dp": (("--dp", "--dp-size", "--data-parallel-size"), "data parallelism: start one server for each GPU"),
    "pp": (("--pp", "--pp-size", "--pipeline-parallel-size"), "pipeline parallelism is not built yet; use --tp"),
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
_SWITCHES = ("trust_remote_code", "enable_metrics", "enable_cache_report")


def add_sglang_flags(parser: argparse.ArgumentParser) -> None:
    """All of them, in one group."""
    g = parser.add_argument_group("SGLang's names, accepted so that launch lines run")
    for dest, (names, _) in COUNTS.items():
        g.add_argument(*names, type=int, default=1, dest=dest, metavar="N", help="1 only")
    g.add_argument("--json-model-override-args", default="{}", metavar="JSON",
                   help="{} only: overrides are not built yet")
    g.add_argument("--mamba-ssm-dtype", metavar="NAME", help="float32 only: other state formats are not built yet")
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
    if arguments.mamba_ssm_dtype not in (None, "float32"):
        raise UsageError(f"--mamba-ssm-dtype {arguments.mamba_ssm_dtype}: states in other formats than float32 are not "
                         "built yet; leave it out")
    _check_overrides(arguments.json_model_override_args)
    for dest, (names, reason) in IGNORED.items():
        if getattr(arguments, dest) is not None:
            print(f"qcn-run: {names[0]} has no effect: {reason}", file=sys.stderr)


def _check_overrides(text: str) -> None:
    try:
        overrides = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--json-model-override-args: is no JSON ({error})") from None
    if not isinstance(overrides, dict):
        raise UsageError("--json-model-override-args: must be a JSON object")
    if overrides:
        raise UsageError(f"--json-model-override-args {', '.join(overrides)}: overrides of the model's config, such as "
                         "YaRN for longer contexts, are not built yet; leave it out")
