"""All environment variables of the project, typed, in one place. A bad value raises."""

from __future__ import annotations

import os
from pathlib import Path

from qcn_compile.errors import UsageError


def _integer(name: str, default: int, least: int) -> int:
    text = os.environ.get(name)
    if text is None or text == "":
        return default
    try:
        value = int(text)
    except ValueError:
        raise UsageError(f"{name}={text!r}: not a whole number; unset it or give a number >= {least}") from None
    if value < least:
        raise UsageError(f"{name}={value}: must be >= {least}")
    return value


def threads() -> int:
    """`QCN_THREADS`: CPU threads a served process uses. Default: the cores this process may run on."""
    return _integer("QCN_THREADS", len(os.sched_getaffinity(0)), 1)


def build_jobs() -> int:
    """`QCN_BUILD_JOBS`: parallel workers of a GPU build. Default: the cores this process may run on."""
    return _integer("QCN_BUILD_JOBS", len(os.sched_getaffinity(0)), 1)


def targets_folder() -> Path | None:
    """`QCN_TARGETS`: a folder with more hardware files, like those of targets/data. Raises UsageError if it is none."""
    text = os.environ.get("QCN_TARGETS")
    if text and not Path(text).is_dir():
        raise UsageError(f"QCN_TARGETS={text}: is no folder; unset it or name one with hardware files (.toml)")
    return Path(text) if text else None


def rank_timeout() -> int:
    """`QCN_RANK_TIMEOUT`: seconds a rank waits for another in a collective before all give up. Default: 60."""
    return _integer("QCN_RANK_TIMEOUT", 60, 1)


ALL_REDUCE = ("one-shot", "nccl", "fused")


def all_reduce() -> str:
    """`QCN_ALL_REDUCE`: one-shot (default): small sums of ranks go over peer memory; nccl: none do; fused: and the norm
    behind a small sum is computed with it. Raises UsageError for another word."""
    found = os.environ.get("QCN_ALL_REDUCE", "") or ALL_REDUCE[0]
    if found not in ALL_REDUCE:
        raise UsageError(f"QCN_ALL_REDUCE={found}: choose {', '.join(ALL_REDUCE)}")
    return found


def hub_cache() -> Path:
    """`HF_HUB_CACHE` or `HF_HOME`/hub: where Hugging Face checkpoints are looked up."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    home = os.environ.get("HF_HOME", os.path.join(os.path.expanduser("~"), ".cache", "huggingface"))
    return Path(home) / "hub"


def cache_home() -> Path:
    """`XDG_CACHE_HOME`: where builds of checkpoints given to qcn-run are kept, in a folder of ours."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"))


def offline() -> bool:
    """`HF_HUB_OFFLINE`: 1 forbids any download."""
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes")
