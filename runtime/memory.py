"""How many KV pages and state slots to reserve, and what that costs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

from qcn_compile.artifact import CacheSpec, Manifest
from qcn_compile.errors import ArtifactError, CapacityError, UsageError

ITEM_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "f8e4m3": 1, "i8": 1}
DEFAULT_SHARE = 0.5  # of the machine's memory that caches may grow into when no budget is given


@dataclass(frozen=True)
class MemoryPlan:
    """The caches of one loaded model. Bytes are reserved; only what requests fill is touched."""

    context_length: int
    page_size: int
    pages: int
    slots: int
    kv_bytes: int
    state_bytes: int

    @property
    def tokens(self) -> int:
        """Tokens all sequences together can hold."""
        return self.pages * self.page_size

    def __str__(self) -> str:
        return (f"KV cache {self.pages} pages x {self.page_size} = {self.tokens} tokens ({self.kv_bytes / 1e6:.1f} MB)"
                f", {self.slots} state slots ({self.state_bytes / 1e6:.1f} MB), touched as they fill")


def plan_memory(manifest: Manifest, context_length: int | None, max_running: int, budget: int | None) -> MemoryPlan:
    """Pages for `max_running` whole contexts, fewer when `budget` bytes (default: half of the memory) forbid it.

    Raises UsageError for a context longer than the build's, CapacityError when not even one context fits.
    """
    context = manifest.context_length if context_length is None else context_length
    if not 1 <= context <= manifest.context_length:
        raise UsageError(f"--context-length {context}: the build holds 1 to {manifest.context_length} tokens; "
                         "ask for less, or build again with a larger --context-length")
    if max_running < 1:
        raise UsageError(f"--max-running-requests {max_running}: must be at least 1")
    page_bytes = sum(cache.unit_bytes for cache in manifest.caches if cache.kind == "kv")
    slot_bytes = sum(cache.unit_bytes for cache in manifest.caches if cache.kind != "kv")
    each = -(-context // manifest.page_size)
    limit = int(_memory_bytes() * DEFAULT_SHARE) if budget is None else budget
    left = limit - max_running * slot_bytes
    pages = min(max_running * each, left // page_bytes if page_bytes else max_running * each)
    if pages < each:
        need = each * page_bytes + max_running * slot_bytes
        raise CapacityError(f"one context of {context} tokens and {max_running} state slots need {need / 1e9:.3f} GB, "
                            f"the budget is {limit / 1e9:.3f} GB; lower --context-length or --max-running-requests, "
                            "or raise --cache-memory")
    return MemoryPlan(context, manifest.page_size, pages, max_running, pages * page_bytes, max_running * slot_bytes)


def page_part_bytes(cache: CacheSpec) -> int:
    """Bytes of a page's keys, which are as many as its values'. Raises ArtifactError when the sizes disagree."""
    part = prod(cache.shape) * ITEM_BYTES[cache.dtype]
    if cache.unit_bytes != 2 * part:
        raise ArtifactError(f"cache {cache.name}: a page of shape {cache.shape} {cache.dtype} needs {2 * part} bytes "
                            f"for keys and values, the manifest says {cache.unit_bytes}; build again with qcn-compile")
    return part


def _memory_bytes(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Memory of the machine, or of the container this process runs in."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(machine, int(text)) if text.isdigit() else machine
