"""Shape buckets: the capacities for which a plan is made."""

from __future__ import annotations

from dataclasses import replace

from qcn_compile.artifact import FUSED, PEER_ROWS
from qcn_compile.errors import UsageError
from qcn_compile.targets.base import Bucket

DECODE = (1, 8)
PREFILL = (64, 512)
GPU_DECODE = (1, 2, 4, 8, 16, 32, 64, 128)  # one graph each, so that a step costs what its sequences need
GPU_PREFILL = (512, 1024, 2048, 4096, 8192)  # a long chunk reads the experts once for more tokens
MAX_SEQUENCES = 256
MAX_ROWS = 512  # of logits in one step


def default_buckets(decode: tuple[int, ...] = DECODE, prefill: tuple[int, ...] = PREFILL) -> list[Bucket]:
    """Decode buckets (one token a sequence up to n sequences, or n tokens of fewer) and prefill chunks."""
    sizes = [*decode, *prefill]
    if any(n < 1 for n in sizes) or sizes != sorted(set(sizes)):
        raise UsageError(f"bucket sizes {sizes} must rise and be positive")
    return ([Bucket(f"decode-{n}", n, n, n) for n in decode]
            + [Bucket(f"prefill-{n}", n, min(n, MAX_SEQUENCES), min(n, MAX_ROWS)) for n in prefill])


def buckets_for(kind: str, tp: int = 1) -> list[Bucket]:
    """The buckets of a kind of target; for several GPUs, those of few tokens also with sums fused into norms."""
    if kind != "gpu":
        return default_buckets()
    found = default_buckets(GPU_DECODE, GPU_PREFILL)
    few = [bucket for bucket in found if bucket.tokens <= PEER_ROWS] if tp > 1 else []
    return found + [replace(bucket, name=bucket.name + FUSED, fused=True) for bucket in few]
