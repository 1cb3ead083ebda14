"""calibrate: int4 weights by what they are multiplied with on a text, one op after the other (GPTQ).

The final graph runs once over the text with the reference of every op. Where a weight is stored in int4, its inputs,
made by the weights quantised before it, give its Hessian. Weights are read as they are needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qcn_compile.errors import UsageError
from qcn_compile.ir import int4
from qcn_compile.ir.encoding import GROUP, Coded, encode
from qcn_compile.ir.gptq import hessian, quantize
from qcn_compile.ir.graph import Graph, Op, Value
from qcn_compile.ir.interpret import Walk, default_inputs, last_uses, run_op, together
from qcn_compile.ir.optable import row
from qcn_compile.lowering.rows import Source, evaluate
from qcn_compile.lowering.schedule import encoding_of
from qcn_compile.passes.canonicalize import static_values

CHOSEN = {"int4": GROUP, "int4-g128": int4.GROUP}  # formats whose codes are chosen here, and what shares a scale
LENGTH, TOKENS = 512, 16384  # tokens of a piece of text, and of all together at most
Store = Callable[[Op, Value, Tensor, list[Any]], Tensor]
"""(op, its weight operand, the weight in f32, the op's operands so far) -> the weight as it is stored, in f32."""


@dataclass(frozen=True)
class Calibrated:
    """Codes of static values (the operand of each `encode` to int4), tokens they were made with, and the mean relative
    error of the outputs, against that of rounding to nearest."""

    codes: dict[Value, Coded] = field(default_factory=dict)
    tokens: int = 0
    error: float = 0.0
    rounded: float = 0.0

    @property
    def digest(self) -> str:
        """Of all codes and scales; empty when there are none."""
        digest = hashlib.sha256()
        for coded in self.codes.values():
            digest.update(coded.codes.numpy().tobytes() + coded.scales.numpy().tobytes())
        return digest.hexdigest() if self.codes else ""

    def __str__(self) -> str:
        return (f"{len(self.codes)} weights by {self.tokens} tokens: their outputs are off by {self.error:.2%}, "
                f"rounded to nearest by {self.rounded:.2%}")


def read_text(path: Path, tokenizer: Path) -> list[list[int]]:
    """Token ids of a text, or of the "text" of each line of a .jsonl file, in pieces. Raises UsageError."""
    from tokenizers import Tokenizer

    try:
        whole = path.read_text(encoding="utf-8")
        texts = [json.loads(line)["text"] for line in whole.splitlines()] if path.suffix == ".jsonl" else [whole]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f'--calibrate {path}: cannot be read ({error}); give a text, or a .jsonl file of '
                         'lines {"text": ...}') from None
    known = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    pieces: list[list[int]] = []
    for text in texts:
        ids = known.encode(text, add_special_tokens=False).ids
        pieces += [ids[at:at + LENGTH] for at in range(0, len(ids), LENGTH)]
    chosen = pieces[:: max(1, -(-sum(map(len, pieces)) // TOKENS))]
    if sum(map(len, chosen)) < LENGTH:
        raise UsageError(f"--calibrate {path}: holds {sum(map(len, chosen))} tokens; give at least {LENGTH}, better "
                         f"{TOKENS}, of what the model will be used for")
    return chosen


@torch.no_grad()
def calibrate(graphs: Sequence[Graph], source: Source, pieces: Sequence[list[int]]) -> Calibrated:
    """int4 codes for the weights of a final graph, or of those of all ranks: a rank's by what that rank computes.

    Raises UsageError when nothing is stored in int4.
    """
    if not any(op.name == "encode" and op.attrs["format"] in CHOSEN for graph in graphs for op in graph.ops):
        raise UsageError("--calibrate: no weight is stored in int4, so there is nothing to calibrate; add --quant int4 "
                         "(GPU: int4-experts)")
    codes: dict[Value, Coded] = {}
    errors: list[tuple[float, float]] = []

    def store(op: Op, value: Value, w: Tensor, operands: list[Any]) -> Tensor:
        encoding = encoding_of(value)
        assert encoding is not None and value.op is not None
        if encoding.format not in CHOSEN:
            return torch.from_numpy(encode(w.numpy(), encoding))
        hessians = _hessians(op, value, operands)
        made = [quantize(one, h, CHOSEN[encoding.format])
                for one, h in zip(w.reshape(-1, *w.shape[-2:]), hessians, strict=True)]
        both = (torch.stack(parts).reshape(*w.shape[:-1], -1)
                for parts in ([m.codes for m in made], [m.scales for m in made]))
        coded = Coded(next(both), next(both), made[0].encoding, made[0].size)
        codes[value.op.inputs[0]] = coded
        back, nearest = coded.wide(), torch.from_numpy(encode(w.numpy(), encoding))
        errors.append((_off(w, back, hessians), _off(w, nearest, hessians)))
        return back

    together([_walk(graph, source, pieces, store) for graph in graphs])
    own, nearest = (sum(column) / len(errors) for column in zip(*errors, strict=True))
    return Calibrated(codes, sum(map(len, pieces)), own, nearest)


def walk(graph: Graph, source: Source, pieces: Sequence[list[int]], store: Store) -> list[Any]:
    """Outputs of a final graph in f32, every encoded weight as `store` says. One op's weights are in memory."""
    return together([_walk(graph, source, pieces, store)])[0]


def _walk(graph: Graph, source: Source, pieces: Sequence[list[int]], store: Store) -> Walk:
    inputs = default_inputs(graph, list(pieces))
    env: dict[Value, Any] = {value: inputs[value.name] for value in graph.inputs}
    static, last = static_values(graph), last_uses(graph)
    for index, op in enumerate(graph.ops):
        if op.results[0] in static:
            continue
        operands: list[Any] = []
        for value in op.operands:
            if value is None or value not in static:
                operands.append(None if value is None else env[value])
            elif encoding_of(value) is None or value.op is None or value.op.name != "encode":
                w = evaluate(value, source.get)
                operands.append(w.float() if w.is_floating_point() else w)
            else:
                w = evaluate(value.op.inputs[0], source.get).float()
                operands.append(store(op, value, w, operands))
        results = [(yield op, operands[0])] if row(op.name).collective else run_op(op, operands)
        env.update(zip(op.results, results, strict=True))
        for value in set(op.inputs) | set(op.results):
            if last.get(value, index) <= index:
                env.pop(value, None)
    return [env[v] for v in graph.outputs]


def _hessians(op: Op, value: Value, operands: list[Any]) -> list[Tensor]:
    """The Hessian of each matrix of a weight: of a projection's input, or of what the router sends to each expert."""
    x = operands[0]
    if op.name in ("linear", "linear_add"):
        return [hessian(x.reshape(-1, x.shape[-1]))]
    ids, weights = operands[1], operands[2]
    result = []
    for expert in range(int(value.tensor.shape[0])):  # type: ignore[arg-type]
        token, slot = torch.where(ids == expert)
        inner = x[token]
        if len(operands) == 4:  # gate_up is quantised already: this is down
            gate, up = F.linear(inner.float(), operands[3][expert]).chunk(2, -1)
            inner = F.silu(gate) * up
        result.append(hessian(inner, weights[token, slot]))
    return result


def _off(w: Tensor, stored: Tensor, hessians: Iterable[Tensor]) -> float:
    """||(w - stored) x|| / ||w x|| over all inputs x of all matrices."""
    wrong = whole = 0.0
    flat = zip(w.reshape(-1, *w.shape[-2:]).double(), stored.reshape(-1, *w.shape[-2:]).double(), hessians, strict=True)
    for one, other, h in flat:
        wrong += float((((one - other) @ h) * (one - other)).sum())
        whole += float(((one @ h) * one).sum())
    return (wrong / whole) ** 0.5 if whole else 0.0
