"""Perplexity of every weight format on the bundled model, KL from fp32: python -m tests.bench.format_quality [ROW...]

The final graph runs in fp32 with weights as each format stores them, activations in fp32: 12 held-out files, 512 tokens
each; int4 is also calibrated (GPTQ) on the other 35. The table of docs/planning.md; ROW is a name of its first column,
such as "gpu int4-experts" or "cpu int4 calibrated".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from qcn_compile.compile import Options, optimised
from qcn_compile.frontend import trace_model
from qcn_compile.frontend.checkpoint import locate
from qcn_compile.ir.encoding import Encoding, encode
from qcn_compile.ir.graph import Graph, Op, Value
from qcn_compile.lowering.calibrate import LENGTH, Calibrated, Store, calibrate, walk
from qcn_compile.planning.formats import Scheme, scheme_of
from tests.bench.format_errors import mxfp4

HELDOUT, EVALUATED = Path("tests/data/heldout.jsonl"), 12
SCHEMES = (("cpu", "none"), ("cpu", "int8"), ("gpu", "fp8"), ("cpu", "int4-experts"), ("cpu", "int4"),
           ("gpu", "int4-experts"), ("gpu", "int4"), ("gpu", "nvfp4"), ("gpu", "mxfp4"))
CALIBRATED = (("cpu", "int4"), ("gpu", "int4-experts"), ("gpu", "int4"))
GROUPS = {"fp8": 128, "int4-g128": 128, "nvfp4": 16}


def rounded(w: Tensor, format_: str) -> Tensor:
    """What a stack of matrices [..., N, K] stands for in a format, by the rounding of the builds where there is one."""
    if format_ == "mxfp4":
        flat = [mxfp4(one) for one in w.reshape(-1, *w.shape[-2:])]
        return torch.stack(flat).reshape(w.shape)
    return w if format_ == "f32" else torch.from_numpy(encode(w.numpy(), Encoding(format_, GROUPS.get(format_, 32))))


def stored_as(scheme: Scheme) -> Graph:
    """The final graph with weights in a scheme's formats."""
    graph = optimised(None, "cpu", Options(quant="int4", dtype="fp32"))
    for op in graph.ops:
        for value in op.inputs:
            if value.op is not None and value.op.name == "encode" and value.op.attrs["format"] == "int4":
                format_ = _format(scheme, op, value)
                value.op.attrs |= {"format": format_, "group": GROUPS.get(format_, 32), "activations": "f32"}
    return graph


def main() -> None:
    """A line a scheme."""
    located = locate(None, "cpu")
    assert located.path is not None
    source = trace_model(located).weights
    assert source is not None
    graph = optimised(None, "cpu", Options(quant="int4", dtype="fp32"))
    encode = Tokenizer.from_file(str(located.path / "tokenizer.json")).encode
    texts = [json.loads(line)["text"] for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
    ids = [encode(text, add_special_tokens=False).ids for text in texts]
    pieces, wanted = [i[:LENGTH] for i in ids[:EVALUATED]], [i[1:LENGTH + 1] for i in ids[:EVALUATED]]

    def measure(graph: Graph, store: Store) -> Tensor:
        logits = walk(graph, source, pieces, store)[0].double()
        parts = logits.split([len(p) for p in pieces])
        return torch.log_softmax(torch.cat([p[:len(w)] for p, w in zip(parts, wanted, strict=True)]), -1)

    target = torch.tensor([token for row in wanted for token in row])

    def show(name: str, log_p: Tensor) -> None:
        nats = -log_p.gather(1, target[:, None]).mean()
        kl = (exact.exp() * (exact - log_p)).sum(-1).mean()
        same = (exact.argmax(-1) == log_p.argmax(-1)).float().mean()
        print(f"| {name} | {float(nats.exp()):.4f} | {float(kl):.5f} | {float(same):.1%} |", flush=True)

    rest = [i[at:at + LENGTH] for i in ids[EVALUATED:] for at in range(0, len(i), LENGTH)]
    exact = measure(graph, lambda op, value, w, _: w)
    show("fp32", exact)
    for kind, name in SCHEMES:
        scheme = scheme_of(name, kind)
        if not (asked := sys.argv[1:]) or f"{kind} {name}" in asked:
            show(f"{kind} {name}: " + ", ".join(scheme.formats),
                 measure(graph, lambda op, value, w, _, scheme=scheme: rounded(w, _format(scheme, op, value))))  # type: ignore[misc]
        if (kind, name) in CALIBRATED and (not asked or f"{kind} {name} calibrated" in asked):
            own = stored_as(scheme)
            made = calibrate([own], source, rest)
            show(f"{kind} {name} calibrated, {made}", measure(own, _with_codes(made)))


def _with_codes(made: Calibrated) -> Store:
    """Weights as calibration chose them, the others rounded."""
    def store(op: Op, value: Value, w: Tensor, _: list[Any]) -> Tensor:
        assert value.op is not None
        coded = made.codes.get(value.op.inputs[0])
        return coded.wide() if coded else rounded(w, str(value.op.attrs["format"]))
    return store


def _format(scheme: Any, op: Op, value: Value) -> str:
    """The format of a weight: by class where the graph stores it in int4, else as it is."""
    assert value.op is not None
    if value.op.attrs["format"] != "int4":
        return "bf16"
    head = op.loc is not None and "lm_head" in str(op.loc)
    return str(scheme.experts if op.name.startswith("moe_") else scheme.head if head else scheme.dense)


if __name__ == "__main__":
    with torch.no_grad():
        main()
