"""Perplexity of every weight format on the bundled model and KL from fp32: `python -m tests.bench.format_quality`.

The final graph runs in fp32 with weights as each format stores them, activations in fp32: 12 held-out files, 512 tokens
each; int4 is also calibrated (GPTQ) on the other 35. The table of docs/planning.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from qcn_compile.compile import Options, optimised
from qcn_compile.frontend import trace_model
from qcn_compile.frontend.checkpoint import locate
from qcn_compile.ir.graph import Op, Value
from qcn_compile.lowering.calibrate import LENGTH, calibrate, walk
from qcn_compile.planning.formats import scheme_of
from tests.bench.format_errors import FORMATS, four_bit, int4, stored

HELDOUT, EVALUATED = Path("tests/data/heldout.jsonl"), 12
SCHEMES = (("cpu", "none"), ("cpu", "int8"), ("gpu", "fp8"), ("cpu", "int4-experts"), ("cpu", "int4"), ("gpu", "int4"),
           ("gpu", "nvfp4"), ("gpu", "mxfp4"))


def rounded(w: Tensor, format_: str) -> Tensor:
    """What a stack of matrices [..., N, K] stands for in a format."""
    if w.dim() > 2:
        return torch.stack([rounded(one, format_) for one in w])
    if format_ in ("bf16", "f32"):
        return w.bfloat16().float() if format_ == "bf16" else w
    other: dict[str, Callable[[], Tensor]] = {
        "int4-g128": lambda: int4(w, 128), "nvfp4": lambda: four_bit(w, 16, False),
        "mxfp4": lambda: four_bit(w, 32, True)}
    return other[format_]() if format_ in other else stored(w, FORMATS[format_])


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

    def measure(store: Callable[[Op, Value, Tensor, list[Any]], Tensor]) -> Tensor:
        logits = walk(graph, source, pieces, store)[0].double()
        parts = logits.split([len(p) for p in pieces])
        return torch.log_softmax(torch.cat([p[:len(w)] for p, w in zip(parts, wanted, strict=True)]), -1)

    target = torch.tensor([token for row in wanted for token in row])

    def show(name: str, log_p: Tensor) -> None:
        nats = -log_p.gather(1, target[:, None]).mean()
        kl = (exact.exp() * (exact - log_p)).sum(-1).mean()
        same = (exact.argmax(-1) == log_p.argmax(-1)).float().mean()
        print(f"| {name} | {float(nats.exp()):.4f} | {float(kl):.5f} | {float(same):.1%} |", flush=True)

    exact = measure(lambda op, value, w, _: w)
    show("fp32", exact)
    for kind, name in SCHEMES:
        scheme = scheme_of(name, kind)
        show(f"{kind} {name}: " + ", ".join(dict.fromkeys(scheme.formats)),
             measure(lambda op, value, w, _, scheme=scheme: rounded(w, _format(scheme, op, value))))  # type: ignore[misc]
    own = calibrate([graph], source, [i[at:at + LENGTH] for i in ids[EVALUATED:] for at in range(0, len(i), LENGTH)])
    print(own)
    codes = {key: coded.wide() for key, coded in own.codes.items()}
    show("cpu int4, calibrated", measure(lambda op, value, w, _: codes.get(value.op.inputs[0], w)))  # type: ignore[union-attr]


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
