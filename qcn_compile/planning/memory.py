"""Bytes a rank needs, by kind: weights, KV pages, states, workspace, graphs, what the driver keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from qcn_compile.planning.formats import CLASSES, Scheme
from qcn_compile.planning.shape import ModelShape, share
from qcn_compile.planning.work import Machine
from qcn_compile.targets.layout import Layout
from qcn_compile.targets.spec import Hardware

PAGE = 32  # tokens of a KV page
RING = 16  # inputs of a convolution that GPU kernels keep for each sequence
GRAPHS = 1 << 30  # graphs and modules: what the runtime sets aside on a GPU
DRIVER = 0.73e9  # measured on an H100: 85.02 GB in all, 84.29 GB for a process without torch
BUFFERS = 0.4e9  # assumed: what a communicator keeps on each rank
WIDEST = {"gpu": 8192, "cpu": 512}  # tokens of the largest prefill plan
ROWS = 512  # of logits in one step


@dataclass(frozen=True)
class Needs:
    """Bytes on one rank (the fullest): `kv_token` a token, `slot` a running sequence, the others once."""

    weights: int
    kv_token: int
    slot: int
    workspace: int
    graphs: int
    reserved: int
    available: int

    @property
    def left(self) -> int:
        """Bytes for states and KV pages; negative when the weights alone do not fit."""
        return self.available - self.weights - self.workspace - self.graphs - self.reserved

    def kv(self, context: int) -> int:
        """Bytes of the whole pages of a context."""
        return -(-context // PAGE) * PAGE * self.kv_token

    def concurrency(self, context: int) -> int:
        """Sequences at once, each with a whole context and a state."""
        return max(0, self.left // (self.slot + self.kv(context)))

    def longest(self, limit: int, requests: int = 1, slots: int = 1) -> int:
        """Tokens of context that `requests` sequences at once may each have beside `slots` states, at most `limit`."""
        room = (self.left - slots * self.slot) // requests
        return max(0, min(limit, room // self.kv_token // PAGE * PAGE if self.kv_token else limit))

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "left": self.left}


def needs(shape: ModelShape, scheme: Scheme, layout: Layout, chip: Hardware, memory: float) -> Needs:
    """The needs of the fullest rank on a chip with `memory` bytes."""
    gpu = chip.kind == "gpu"
    machine = Machine.of(chip.kind, scheme)
    stages = [_stage(shape, scheme, layout, i) for i in range(layout.pp)]
    delta, attention, weights = max(stages, key=lambda s: s[2])
    keys, heads, channels = (share(n, layout.tp) for n in (shape.kv_heads, shape.value_heads, shape.channels))
    conv = channels * (RING if gpu else shape.taps - 1) * machine.conv
    slot = delta * (heads * shape.key_dim * shape.value_dim * 4 + conv)
    kv = attention * 2 * keys * shape.head_dim * machine.kv
    # logits, and of the largest prefill about four hidden states; on a GPU also what its experts take in and give
    pairs = (shape.top_k + 1) * (shape.hidden + share(shape.expert_width, layout.expert_tp)) if gpu else 0
    workspace = (ROWS * share(shape.vocab, layout.tp)
                 + WIDEST[chip.kind] * (4 * shape.hidden + pairs)) * machine.activation
    reserved = (chip.reserved.value * 1e9 if chip.reserved else DRIVER) if gpu else 0
    return Needs(weights, kv, slot, workspace, GRAPHS if gpu else 0,
                 int(reserved + (BUFFERS if layout.ranks > 1 and gpu else 0)), int(memory))


def _stage(shape: ModelShape, scheme: Scheme, layout: Layout, index: int) -> tuple[int, int, int]:
    """(DeltaNet layers, attention layers, bytes of weights) of a pipeline stage on one rank."""
    layers = layout.stage(index, shape.layers)
    every = shape.layers // shape.attention_layers if shape.attention_layers else shape.layers + 1
    attention = sum((layer + 1) % every == 0 for layer in layers)
    delta = len(layers) - attention
    counts = elements(shape, layout, delta, attention, index == 0, index == layout.pp - 1)
    return delta, attention, int(sum(counts[kind] * scheme.bits(kind) / 8 for kind in CLASSES))


def elements(shape: ModelShape, layout: Layout, delta: int, attention: int, first: bool, last: bool) -> dict[str, int]:
    """Weights of each class that a rank holds of so many layers, with the embedding if `first`, lm_head if `last`."""
    tp, hidden, layers = layout.tp, shape.hidden, delta + attention
    channels, mixed = share(shape.channels, tp), share(shape.mixed, tp)
    attended, cached = share(shape.heads, tp) * shape.head_dim, share(shape.kv_heads, tp) * shape.head_dim
    shared = 3 * hidden * share(shape.shared_width, tp if layout.shared_expert == "split" else 1)
    routed = shape.experts // layout.ep * 3 * hidden * share(shape.expert_width, layout.expert_tp)
    heads, vocab = share(shape.value_heads, tp), share(shape.vocab, tp)
    return {
        "experts": layers * (routed + shared),
        "dense": delta * hidden * (channels + 2 * mixed) + attention * hidden * (3 * attended + 2 * cached),
        "head": vocab * hidden * last,
        "embedding": vocab * hidden * first,
        "sensitive": layers * hidden * (shape.experts + (shape.shared_width > 0)) + delta * hidden * 2 * heads,
        "vectors": layers * 2 * hidden + hidden * last + delta * (channels * shape.taps + 2 * heads + shape.value_dim)
        + attention * 2 * shape.head_dim,
    }
