"""decide: weight format, activations and context length for a target, each with its reason."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

from qcn_compile.flags import check_context
from qcn_compile.frontend import Traced
from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.graph import Graph
from qcn_compile.lowering.schedule import stored_fraction
from qcn_compile.targets.base import Target
from qcn_compile.targets.choices import DTYPES, check_choices

SMALL = 256 << 20  # below this many bytes of bf16 weights, quantisation saves nothing a user would notice


@dataclass(frozen=True)
class Decision:
    """What was chosen, and why. Bytes count all weights of the main graph at the chosen format."""

    base: str
    format: str
    activations: str
    context_length: int
    weight_bytes: int
    reasons: dict[str, str]

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def decide(traced: Traced, target: Target, dtype: str | None, quant: str, activations: str | None,
           context_length: int | None) -> Decision:
    """Resolve the user's wishes. Raises UsageError naming what is impossible, with the number that breaks it."""
    check_choices(target.kind, target.name, dtype, quant, activations)
    reasons: dict[str, str] = {}
    elements = _elements(traced.main)
    base = _base(traced, target, dtype, reasons)
    format_ = _format(quant, elements, target, reasons)
    check_choices(target.kind, target.name, dtype, format_, activations)
    acts = _activations(activations, format_, target, reasons)
    longest = int(traced.config.get("max_position_embeddings", 32768))
    check_context(context_length, longest)
    reasons["context_length"] = "asked for" if context_length else "the model's own limit"
    kept = base if format_ == "none" else format_
    size = int(elements * 4 * stored_fraction(Encoding(kept)))
    return Decision(base, format_, acts, context_length or longest, size, reasons)


def _elements(graph: Graph) -> int:
    total = 0
    for op in graph.ops:
        if op.name == "weight":
            total += op.result.tensor.bytes() * 8 // op.result.tensor.dtype.bits
    return total


def _base(traced: Traced, target: Target, dtype: str | None, reasons: dict[str, str]) -> str:
    if target.kind == "gpu":
        reasons["dtype"] = "GPU kernels compute on bf16"
        return "bf16"
    if dtype:
        reasons["dtype"] = "asked for with --dtype"
        return DTYPES[dtype]
    stored = str(traced.config.get("dtype") or traced.config.get("torch_dtype") or "float32")
    base = "bf16" if "bfloat16" in stored else "f32"
    reasons["dtype"] = f"the checkpoint is stored in {stored}"
    return base


def _format(quant: str, elements: int, target: Target, reasons: dict[str, str]) -> str:
    if quant != "auto":
        reasons["quant"] = "asked for with --quant"
        return quant
    if 2 * elements <= SMALL:
        reasons["quant"] = f"{2 * elements / 1e6:.1f} MB in bf16 is small: nothing to gain from fewer bits"
        return "none"
    if target.kind == "gpu":
        reasons["quant"] = (f"decode reads every active weight once a token, so bytes are time: "
                            f"{elements / 1e9:.1f} GB at fp8 against {elements * 2 / 1e9:.1f} GB in bf16")
        return "fp8"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    reasons["quant"] = (f"decode reads every active weight once a token, so bytes are time: "
                        f"{elements * 4.5 / 8 / 1e9:.1f} GB at int4 against {elements * 2 / 1e9:.1f} GB in bf16 "
                        f"(this machine has {memory / 1e9:.0f} GB)")
    return "int4"


def _activations(asked: str | None, format_: str, target: Target, reasons: dict[str, str]) -> str:
    if target.kind == "gpu":
        reasons["activations"] = "GPU kernels multiply bf16 activations"
        return "f32"
    if asked:
        reasons["activations"] = "asked for with --activations"
        return "int8" if asked == "int8" else "f32"
    reasons["activations"] = "float weights" if format_ == "none" else "int8 products are twice as fast on this target"
    return "f32" if format_ == "none" else "int8"
