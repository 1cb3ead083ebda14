"""How many KV pages and state slots to reserve, and what that costs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

from qcn_compile.artifact import CacheSpec, Manifest
from qcn_compile.errors import ArtifactError, CapacityError, UsageError
from qcn_compile.runtime.prefix.options import PrefixOptions

ITEM_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "f8e4m3": 1, "i8": 1}
DEFAULT_SHARE = 0.5  # of the machine's memory that caches may grow into when no budget is given
HOST_SHARE = 0.1  # of the machine's memory, for cached prefixes that pages and slots have no room for
MOST_SNAPSHOTS = 4096  # slots for snapshots unless more are asked for


@dataclass(frozen=True)
class MemoryPlan:
    """The caches of one loaded model. Bytes are reserved; only what requests fill is touched.

    slots: of running sequences. snapshots: slots besides, for cached prefixes. host_bytes: for more of these.
    drafts: slots besides, a second one for each running sequence, which steps with drafts write to.
    """

    context_length: int
    page_size: int
    pages: int
    slots: int
    kv_bytes: int
    state_bytes: int
    snapshots: int = 0
    host_bytes: int = 0
    drafts: int = 0

    @property
    def state_slots(self) -> int:
        """Slots that steps read and write: running sequences' first, then their second ones."""
        return self.slots + self.drafts

    @property
    def all_slots(self) -> int:
        """Those of steps, then snapshots'."""
        return self.state_slots + self.snapshots

    @property
    def tokens(self) -> int:
        """Tokens all sequences together can hold."""
        return self.pages * self.page_size

    def __str__(self) -> str:
        prefixes = f" + {self.snapshots} for cached prefixes" if self.snapshots else ""
        prefixes += f" + {self.drafts} for drafts" if self.drafts else ""
        host = f", {self.host_bytes / 1e6:.1f} MB of host memory for prefixes" if self.host_bytes else ""
        contexts = min(self.slots, self.tokens // self.context_length)
        each = self.kv_bytes / self.tokens if self.tokens else 0.0
        state = self.state_bytes / self.all_slots if self.all_slots else 0.0
        costs = f" (a sequence costs {state / 1e6:.2f} MB, and {each / 1e3:.2f} kB for each of its tokens)"
        return (f"KV cache {self.pages} pages x {self.page_size} = {self.tokens} tokens ({self.kv_bytes / 1e6:.1f} MB)"
                f", {self.slots}{prefixes} state slots ({self.state_bytes / 1e6:.1f} MB): "
                f"{self.slots} sequences at once, {contexts} of them with all {self.context_length} tokens{costs}"
                f"{host}, touched as they fill")


def plan_memory(manifest: Manifest, context_length: int | None, max_running: int, budget: int | None,
                prefix: PrefixOptions | None = None, speculate: bool = False) -> MemoryPlan:
    """Pages for `max_running` whole contexts, fewer when `budget` bytes (default: half of the memory) forbid it.

    With `prefix` also slots for snapshots of cached prefixes, with `speculate` a second one for each running sequence.
    Raises UsageError for a context longer than the build's, CapacityError when not even one context fits.
    """
    context = manifest.context_length if context_length is None else context_length
    if not 1 <= context <= manifest.context_length:
        raise UsageError(f"--context-length {context}: the build is for 1 to {manifest.context_length} tokens; ask for "
                         "less, build again with a larger --context-length, or stretch the model's rope with "
                         "--json-model-override-args '{\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": ...}}'")
    if max_running < 1:
        raise UsageError(f"--max-running-requests {max_running}: must be at least 1")
    caches = [cache for part in manifest.ranks or (manifest,) for cache in part.caches]  # CPU ranks share the machine
    page_bytes = sum(cache.unit_bytes for cache in caches if cache.kind == "kv")
    slot_bytes = sum(cache.unit_bytes for cache in caches if cache.kind != "kv")
    each = -(-context // manifest.page_size)
    limit = int(memory_bytes() * DEFAULT_SHARE) if budget is None else budget
    if prefix is not None and prefix.states is not None:
        max_running = min(max_running, prefix.states)
    drafts = max_running if speculate else 0
    snapshots = _snapshots(prefix, limit, slot_bytes, max_running, drafts, each * page_bytes)
    states = max_running + drafts + snapshots
    left = limit - states * slot_bytes
    pages = min(max_running * each, left // page_bytes if page_bytes else max_running * each)
    if pages < each:
        need = each * page_bytes + states * slot_bytes
        raise CapacityError(f"one context of {context} tokens and {states} state slots need "
                            f"{need / 1e9:.3f} GB, "
                            f"the budget is {limit / 1e9:.3f} GB; lower --context-length or --max-running-requests, "
                            "or raise --cache-memory")
    host = 0
    if prefix is not None:
        host = int(memory_bytes() * HOST_SHARE) if prefix.host_bytes is None else prefix.host_bytes
    return MemoryPlan(context, manifest.page_size, pages, max_running, pages * page_bytes,
                      states * slot_bytes, snapshots, host, drafts)


def _snapshots(prefix: PrefixOptions | None, limit: int, slot_bytes: int, running: int, drafts: int,
               context_bytes: int) -> int:
    """Slots for cached prefixes: as many as asked for (drafts' come on top), else by the ratio, but one whole context
    must fit, too."""
    if prefix is None or not slot_bytes:
        return 0
    if prefix.states is not None:
        return max(0, prefix.states - running)
    by_ratio = int(limit * prefix.ratio / (1 + prefix.ratio)) // slot_bytes
    return max(0, min(by_ratio, (limit - context_bytes) // slot_bytes, running + MOST_SNAPSHOTS) - running - drafts)


def shared_budget(share: float, total: int, weights: int) -> int:
    """Bytes for caches when they and the weights together take `share` of the memory, as SGLang counts.

    Raises CapacityError when the weights alone take more.
    """
    left = int(total * share) - weights
    if left < 0:
        raise CapacityError(f"--mem-fraction-static {share:g} of {total / 1e9:.1f} GB is less than the weights, "
                            f"{weights / 1e9:.1f} GB; raise it")
    return left


def weight_file_bytes(build: Path, manifest: Manifest) -> int:
    """Bytes of a build's weight files."""
    files = [name for part in manifest.ranks or (manifest,) for name in part.weights.get("files", ())]
    return sum((build / name).stat().st_size for name in files)


def page_part_bytes(cache: CacheSpec) -> int:
    """Bytes of a page's keys, which are as many as its values'. Raises ArtifactError when the sizes disagree."""
    part = prod(cache.shape) * ITEM_BYTES[cache.dtype]
    if cache.unit_bytes != 2 * part:
        raise ArtifactError(f"cache {cache.name}: a page of shape {cache.shape} {cache.dtype} needs {2 * part} bytes "
                            f"for keys and values, the manifest says {cache.unit_bytes}; build again with qcn-compile")
    return part


def memory_bytes(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Memory of the machine, or of the container this process runs in."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(machine, int(text)) if text.isdigit() else machine
