"""What a build says of itself: manifest, plans, launches, caches. Plain data, read and written as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

SCHEMA = 3
ALIGNMENT = 64


@dataclass(frozen=True)
class Arg:
    """One kernel argument. `kind` says where the pointer comes from:

    workspace  `offset` bytes into the workspace             weight  blob `name` of the weights
    state      `name` of a cache, `part` (k, v or "" )       input   runtime array `name` (see INPUTS)
    output     workspace result handed to the caller: `name` and `offset`
    """

    kind: str
    name: str = ""
    offset: int = 0
    part: str = ""


INPUTS = {
    "counts": "i32[4]: tokens T, sequences S, wanted rows R, width of the block table",
    "tokens": "i32[T]: token ids, sequence after sequence",
    "positions": "i32[T]: position of each token in its sequence",
    "token_seq": "i32[T]: index of the sequence each token belongs to",
    "cu_seqlens": "i32[S+1]: first token of each sequence, then T",
    "context_lens": "i32[S]: tokens of the sequence already in the caches before this step",
    "slots": "i32[S]: state slot of each sequence (conv and delta caches), as it was before this step",
    "into": "i32[S]: the slot that each sequence's state is written to",
    "block_table": "i32[S, width]: KV pages of each sequence, row-major",
    "rows": "i32[R]: tokens whose logits are wanted",
    "choice": "i32[R, 16]: how the device chooses each wanted row's token (GPU only, like what follows)",
    "chosen": "i32[R]: the tokens it chose",
    "last": "i32[slots]: the token last chosen for each slot; token -1 - s in `tokens` stands for it",
    "history": "i32[slots, vocab]: how often a token is in the output, bit 30: it is in the prompt",
    "bias": "f32[slots, vocab]: added to the logits",
    "allowed": "i32[slots, ceil(vocab / 32)]: bits of the tokens that a grammar lets come next",
    "hidden": "f32[T, hidden]: hidden states handed to an entry other than main (the MTP head)",
}


PEER_ROWS = 128  # rows that ranks may exchange at once over each other's memory
FUSED = "-fused"  # end of the names of plans whose sums of ranks go into the norms behind them


@dataclass(frozen=True)
class Collective:
    """What ranks do together instead of a kernel, with `width` elements of `dtype` for each of `rows` (T, S or R)
    rows: all_reduce or all_gather of all ranks of a stage, or send to or recv from rank `peer`. Arguments of its
    launch: x, y, counts."""

    kind: str
    dtype: str
    rows: str
    width: int
    peer: int = -1


@dataclass(frozen=True)
class Launch:
    """One kernel call: its symbol, its arguments in order, and the op of the final graph it came from.

    `grid` is the launch grid on a GPU (static in a bucket) and empty on a CPU. `others`: kernels and grids that do the
    same; the card chooses one for all launches of a `role` when the build is first loaded.
    """

    kernel: str
    args: tuple[Arg, ...]
    op: str
    location: str
    bytes: int = 0
    flops: int = 0
    grid: tuple[int, ...] = ()
    collective: Collective | None = None
    role: str = ""
    others: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Route:
    """A router of the plan: after `launch`, i32 [T, slots] at workspace `offset` names the experts of each token, of
    `experts` that there are. Columns from `top_k` on are shared experts, which every token takes."""

    launch: int
    layer: str
    offset: int
    slots: int
    top_k: int
    experts: int


@dataclass(frozen=True)
class Plan:
    """The launches of one bucket. Capacities are upper bounds; the true sizes are in `counts` at run time.

    `outputs` maps a name (logits, hidden) to its workspace offset, dtype and row width.
    """

    entry: str
    name: str
    tokens: int
    sequences: int
    rows: int
    workspace_bytes: int
    launches: tuple[Launch, ...]
    outputs: dict[str, dict[str, Any]]
    routes: tuple[Route, ...] = ()

    @property
    def key(self) -> str:
        """Unique in a build."""
        return f"{self.entry}-{self.name}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Plan:
        launches = tuple(
            Launch(**{**row, "args": tuple(Arg(**arg) for arg in row["args"]), "grid": tuple(row["grid"]),
                      "collective": Collective(**row["collective"]) if row.get("collective") else None,
                      "others": tuple((kernel, tuple(grid)) for kernel, grid in row.get("others", ()))})
            for row in data["launches"]
        )
        routes = tuple(Route(**row) for row in data.get("routes", ()))
        return Plan(**{**data, "launches": launches, "routes": routes})


@dataclass(frozen=True)
class CacheSpec:
    """A cache the plan names. `unit_bytes` per KV page (keys and values together) or per state slot.

    kv:    part k is [pages, heads, dim, page], part v is [pages, heads, page, dim]
    conv:  [slots, width-1, channels]         delta: [slots, value_heads, key_dim, value_dim]
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    unit_bytes: int


@dataclass(frozen=True)
class RankPart:
    """What one rank of several has of its own: caches, plans and weights as in the manifest."""

    caches: tuple[CacheSpec, ...]
    plans: tuple[str, ...]
    weights: dict[str, Any]

    @staticmethod
    def from_json(data: dict[str, Any]) -> RankPart:
        return RankPart(_caches(data["caches"]), tuple(data["plans"]), data["weights"])


def _caches(rows: list[dict[str, Any]]) -> tuple[CacheSpec, ...]:
    return tuple(CacheSpec(**{**row, "shape": tuple(row["shape"])}) for row in rows)


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime needs to know before it maps a file.

    layout: how the model lies on several ranks (tp, ep, ...; see targets/layout.py), empty for one. Then `ranks` has
    their parts, and caches, plans and weights here are those of rank 0.
    """

    schema: int
    model: dict[str, Any]
    target: dict[str, Any]
    decisions: dict[str, Any]
    caches: tuple[CacheSpec, ...]
    page_size: int
    context_length: int
    vocab_size: int
    hidden_size: int
    plans: tuple[str, ...]
    libraries: tuple[str, ...]
    weights: dict[str, Any]
    tools: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[RankPart, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Manifest:
        return Manifest(**{**data, "caches": _caches(data["caches"]), "plans": tuple(data["plans"]),
                           "libraries": tuple(data["libraries"]),
                           "ranks": tuple(RankPart.from_json(part) for part in data.get("ranks", ()))})

    def of_rank(self, rank: int, fused: bool = False) -> Manifest:
        """The manifest as one rank needs it; with `fused`, plans that have such a twin give way to it."""
        if not self.ranks:
            return self
        part = self.ranks[rank]
        twins = {name: name.removesuffix(f"{FUSED}.json") + ".json" for name in part.plans if f"{FUSED}." in name}
        left = {*twins.values()} if fused else {*twins}
        plans = tuple(name for name in part.plans if name not in left)
        return replace(self, caches=part.caches, plans=plans, weights=part.weights, ranks=())
