"""What one step does on one rank: the ops of the final graph, their bytes and FLOPs counted from the model's sizes.

The counts follow the op table (`ir/ops`): every operand read once, every result written once, weights at their stored
width, the states of the running sequences read and written. `tests/planning/test_work.py` compares them with a traced
graph. Two things are added that the table does not know: the KV pages a step reads, and what ranks tell each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

from qcn_compile.planning.formats import BITS, EXPERTS_ONLY, MATH, Scheme
from qcn_compile.planning.shape import ModelShape, share
from qcn_compile.targets.cost import Work
from qcn_compile.targets.layout import Layout


@dataclass(frozen=True)
class Step:
    """The size of a step: `tokens` of `sequences` sequences with `context` tokens each before it, logits for `rows`."""

    tokens: int
    sequences: int
    rows: int
    context: int

    @staticmethod
    def decode(batch: int, context: int) -> Step:
        """One token for each of `batch` sequences."""
        return Step(batch, batch, batch, context)


@dataclass(frozen=True)
class Machine:
    """How a target computes: bytes of an activation, of a cached key or value, of a convolution input."""

    activation: int
    kv: int
    conv: int
    merged_gates: bool = False  # b and a in one product with q, k, v, z

    @staticmethod
    def of(kind: str, scheme: Scheme) -> Machine:
        """CPU kernels compute and cache in f32, GPU kernels in bf16. One product reads weights stored alike."""
        if kind == "cpu":
            return Machine(4, 4, 4, scheme.dense == scheme.base)
        return Machine(2, 2, 2, scheme.dense == scheme.base)


def step_work(shape: ModelShape, scheme: Scheme, layout: Layout, machine: Machine, step: Step) -> list[Work]:
    """The ops of a step on the busiest rank, and the collectives between ranks."""
    ops = [*_ends(shape, scheme, layout, machine, step), *_delta(shape, scheme, layout, machine, step),
           *_attention(shape, scheme, layout, machine, step), *_mlp(shape, scheme, layout, machine, step)]
    return [*ops, *_collectives(shape, layout, machine, step)]


def _linear(name: str, count: int, rows: int, inputs: int, outputs: int, format_: str, wide: int,
            role: str = "", residual: bool = False) -> Work:
    bytes_ = rows * wide * (inputs + outputs * (2 if residual else 1)) + inputs * outputs * BITS[format_] / 8
    return Work(name, count, bytes_, 2.0 * rows * inputs * outputs, MATH[format_], role)


def _ends(shape: ModelShape, scheme: Scheme, layout: Layout, machine: Machine, step: Step) -> Iterator[Work]:
    """Embedding, norms, lm_head."""
    wide, hidden, tokens = machine.activation, shape.hidden, step.tokens
    yield Work("embedding", 1, tokens * (4 + hidden * (BITS[scheme.base] / 8 + wide)), tokens * hidden)
    norms = 2 * shape.layers + 1
    yield Work("rms_norm", norms, 2 * tokens * hidden * wide + 4 * hidden, tokens * hidden)
    yield _linear("linear", 1, step.rows, hidden, share(shape.vocab, layout.tp), scheme.head, wide, "lm_head")


def _delta(shape: ModelShape, scheme: Scheme, layout: Layout, machine: Machine, step: Step) -> Iterator[Work]:
    """A DeltaNet mixer: projections, convolution and delta rule, output projection."""
    tp, wide, tokens, layers = layout.tp, machine.activation, step.tokens, shape.delta_layers
    if not layers:
        return
    channels, mixed, heads = (share(n, tp) for n in (shape.channels, shape.mixed, shape.value_heads))
    gates = 2 * heads
    projected = channels + mixed + (gates if machine.merged_gates else 0)
    yield _linear("linear", layers, tokens, shape.hidden, projected, scheme.dense, wide, "in_proj")
    if not machine.merged_gates:
        yield _linear("linear", layers, tokens, shape.hidden, gates, scheme.base, wide, "gates")
    state = heads * shape.key_dim * shape.value_dim * 4 + channels * (shape.taps - 1) * machine.conv
    passed = tokens * wide * (channels + 2 * mixed + gates)
    small = 4 * (channels * shape.taps + 2 * heads + shape.value_dim)
    flops = tokens * (7 * heads * shape.key_dim * shape.value_dim + 8 * channels)
    yield Work("delta_net", layers, passed + small + 2 * state * step.sequences, flops, "f32", "delta",
               -(-tokens // step.sequences))
    yield _linear("linear_add", layers, tokens, mixed, shape.hidden, scheme.dense, wide, "out_proj", residual=True)


def _attention(shape: ModelShape, scheme: Scheme, layout: Layout, machine: Machine, step: Step) -> Iterator[Work]:
    """A gated attention mixer: projections, rope and append, attention over the pages, output projection."""
    tp, wide, tokens, layers = layout.tp, machine.activation, step.tokens, shape.attention_layers
    if not layers:
        return
    heads, keys = share(shape.heads, tp), share(shape.kv_heads, tp)
    attended, cached = heads * shape.head_dim, keys * shape.head_dim
    yield _linear("linear", layers, tokens, shape.hidden, 2 * attended + 2 * cached, scheme.dense, wide, "in_proj")
    written = tokens * (wide * (2 * attended + 2 * cached) + 4 * shape.rotary)
    yield Work("rope_append", layers, written + 8 * shape.head_dim, tokens * attended, "f32", "rope")
    each = step.context + -(-tokens // step.sequences) / 2  # keys a token sees, on average
    pages = 2 * cached * machine.kv * step.sequences * (step.context + tokens / step.sequences)
    yield Work("paged_attention", layers, tokens * wide * 3 * attended + pages, 4.0 * tokens * each * attended,
               "bf16", "attention")
    yield _linear("linear_add", layers, tokens, attended, shape.hidden, scheme.dense, wide, "out_proj", residual=True)


def _mlp(shape: ModelShape, scheme: Scheme, layout: Layout, machine: Machine, step: Step) -> Iterator[Work]:
    """Router, top-k, experts; the shared expert is one more expert that every token takes."""
    wide, hidden, tokens, layers = machine.activation, shape.hidden, step.tokens, shape.layers
    shared = int(shape.shared_width > 0)
    yield _linear("linear", layers, tokens, hidden, shape.experts + shared, scheme.base, wide, "router")
    picks = shape.top_k + shared
    yield Work("moe_route", layers, tokens * (wide * (shape.experts + shared) + 8 * picks), tokens * picks, "f32",
               "route")
    touched, pairs = expert_load(shape, layout, tokens)
    whole = 3 * hidden * BITS[scheme.experts] / 8
    read = touched * whole * shape.expert_width / layout.expert_tp
    flops = pairs * 6.0 * hidden * shape.expert_width / layout.expert_tp
    part = layout.tp if layout.shared_expert == "split" else 1
    read += whole * shape.shared_width / part
    flops += tokens * 6.0 * hidden * shape.shared_width / part
    yield Work("moe_add", layers, read + tokens * (3 * wide * hidden + 8 * picks), flops, MATH[scheme.experts],
               "four_bits" if scheme.experts in EXPERTS_ONLY else "experts")


def expert_load(shape: ModelShape, layout: Layout, tokens: int) -> tuple[float, float]:
    """(distinct routed experts, pairs of token and expert) expected on the busiest group under uniform routing.

    A group of all experts: E (1 - (1 - k/E)^T) are touched by T k pairs. With g groups the busiest gets about as many
    pairs as the largest of g normal loads: mean T k / g, variance mean (1 - 1/g), Blom's estimate of the largest.
    """
    experts, pairs = shape.experts, float(tokens * shape.top_k)
    if layout.ep == 1:
        return experts * (1 - (1 - shape.top_k / experts) ** tokens), pairs
    mean = pairs / layout.ep
    largest = NormalDist().inv_cdf((layout.ep - 0.375) / (layout.ep + 0.25))
    most = min(pairs, mean + largest * sqrt(mean * (1 - 1 / layout.ep)))
    own = experts / layout.ep
    return min(most, own * (1 - (1 - 1 / own) ** most)), most


def _collectives(shape: ModelShape, layout: Layout, machine: Machine, step: Step) -> Iterator[Work]:
    """Bytes each rank holds of what is reduced or gathered: after both halves of a layer, the embedding, the logits."""
    size = step.tokens * shape.hidden * machine.activation
    if layout.tp > 1:
        yield Work("all_reduce", 2 * shape.layers + 1, size, role="links")
        yield Work("all_gather", 1, step.rows * shape.vocab * machine.activation, role="links")
    if layout.pp > 1:
        yield Work("send", layout.pp - 1, size, role="links")
