"""Where everything lies on a GPU, to the byte, before anything is taken: layouts, and the sum that must fit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from qcn_compile.artifact import Manifest, Plan
from qcn_compile.runtime.batch import Capacity, InputArrays
from qcn_compile.runtime.cuda.sampling import WIDTH, array_bytes
from qcn_compile.runtime.cuda.weights import total_bytes
from qcn_compile.runtime.memory import MemoryPlan, page_part_bytes

LINE = 256
RESERVE = 1 << 30  # besides what is planned: graphs, modules, and what other processes of a desktop take


def footprint(build: Path, manifest: Manifest, plans: Sequence[Plan], memory: MemoryPlan,
              on_host: Collection[str] = ()) -> dict[str, int]:
    """What -> device bytes of a loaded build, all that its process allocates. on_host: weights that lie elsewhere."""
    caches = {paged: sum(len(keys) * pitch(unit, paged, memory) for (p, unit), keys in cache_groups(manifest).items()
                         if p is paged) for paged in (True, False)}
    fixed = fixed_bytes(build, manifest, plans, memory.context_length, memory.slots, on_host)
    return {**fixed, "KV pages": caches[True], "states": caches[False]}


def fixed_bytes(build: Path, manifest: Manifest, plans: Sequence[Plan], context_length: int,
                slots: int, on_host: Collection[str] = ()) -> dict[str, int]:
    """The same without caches, which take what is left."""
    width = -(-context_length // manifest.page_size)
    rows = max(plan.rows for plan in plans)
    drafting = {"draft inputs": size} if (size := hidden_bytes(plans, manifest.hidden_size)) else {}
    return {"weights": total_bytes(build, manifest.weights, on_host),
            "workspace": max(plan.workspace_bytes for plan in plans),
            "inputs": max(offsets(plan, width)["end"] for plan in plans),
            "sampling": sum(array_bytes(manifest.vocab_size, slots, rows).values()), **drafting}


def hidden_bytes(plans: Sequence[Plan], width: int) -> int:
    """Bytes of the hidden states that the draft head reads, in bf16; 0 without a head."""
    tokens = max((plan.tokens for plan in plans if plan.entry == "mtp"), default=0)
    return -(-2 * width * tokens // LINE) * LINE


def cache_groups(manifest: Manifest) -> dict[tuple[bool, int], list[tuple[str, str]]]:
    """(in pages?, bytes of a page's part or of a slot) -> (cache, part) of all arrays of that kind."""
    groups: dict[tuple[bool, int], list[tuple[str, str]]] = {}
    for cache in manifest.caches:
        paged = cache.kind == "kv"
        unit = page_part_bytes(cache) if paged else cache.unit_bytes
        groups.setdefault((paged, unit), []).extend((cache.name, part) for part in (("k", "v") if paged else ("",)))
    return groups


def pitch(unit: int, paged: bool, memory: MemoryPlan) -> int:
    """Bytes of one array of a cache."""
    return -(-unit * (memory.pages if paged else memory.all_slots) // LINE) * LINE


def input_sizes(plan: Plan, width: int) -> dict[str, int]:
    """Input array -> its numbers, of a plan; the block table last."""
    sizes = {**InputArrays.sizes([Capacity(plan.tokens, plan.sequences, plan.rows)], width),
             "choice": plan.rows * WIDTH}
    return dict(sorted(sizes.items(), key=lambda item: item[0] == "block_table"))


def offsets(plan: Plan, width: int) -> dict[str, int]:
    """Input array -> where it starts in a plan's layout, and `end`."""
    found, at = {}, 0
    for name, size in input_sizes(plan, width).items():
        found[name] = at
        at += -(-4 * size // LINE) * LINE
    return {**found, "end": at}
