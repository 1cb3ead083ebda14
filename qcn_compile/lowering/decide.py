"""decide: formats, layout, activations and context length of a build, each with its reason.

The planner decides (`qcn_compile/planning`): what was asked for narrows its choice, what cannot be ends the build here.
For a model or target that it knows nothing of, small rules stand in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qcn_compile.errors import UsageError
from qcn_compile.flags import check_context
from qcn_compile.frontend import Traced
from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.graph import Graph
from qcn_compile.lowering.schedule import stored_fraction
from qcn_compile.planning.choose import SMALL
from qcn_compile.planning.command import ask_of
from qcn_compile.planning.formats import scheme_of
from qcn_compile.planning.shape import NEXT
from qcn_compile.planning.verdict import Verdict, decide_plan
from qcn_compile.targets.base import Target
from qcn_compile.targets.choices import DTYPES, check_choices
from qcn_compile.targets.layout import Layout
from qcn_compile.targets.spec import chip_of

KV = {"auto": "bf16", "bf16": "bf16", "fp8": "f8e4m3", "fp8_e4m3": "f8e4m3"}  # by SGLang's names
FIRST_E4M3 = 89  # cards from this architecture on convert e4m3
STATES = {"float32": "f32", "bfloat16": "bf16"}  # of DeltaNet, by SGLang's names


@dataclass(frozen=True)
class Decision:
    """What was chosen, and why. Bytes count all weights of the main graph at the chosen format.

    format: the scheme as --quant names it; formats: what it stores each class of weights in. rejected: every candidate
    that was not taken, with the reason. verdict: what the planner predicts, {} for what it knows nothing of.
    """

    base: str
    format: str
    activations: str
    context_length: int
    weight_bytes: int
    reasons: dict[str, str]
    formats: dict[str, str]
    layout: Layout
    rejected: tuple[dict[str, str], ...] = ()
    verdict: dict[str, Any] = field(default_factory=dict)
    kv: str = "bf16"
    states: str = "f32"

    def to_json(self) -> dict[str, object]:
        """All of it, as the report holds it."""
        return asdict(self)

    def brief(self) -> dict[str, object]:
        """What was chosen, as the manifest holds it."""
        return {key: value for key, value in asdict(self).items() if key not in ("rejected", "verdict")}


def plan_for(name: str, config: Mapping[str, Any], target: Target, dtype: str | None, quant: str,
             context_length: int | None, mcpu: str | None = None, **wishes: Any) -> Verdict | None:
    """The planner's verdict on a build; None for a model or target that it knows nothing of.

    Raises UsageError naming what is impossible, with the number that breaks it.
    """
    check_choices(target.kind, target.name, dtype, "auto", None)
    check_context(context_length, int(config.get("max_position_embeddings", 32768)))
    if target.kind == "null" or config.get("model_type") not in NEXT:
        return None
    chip = chip_of(target.name, mcpu)
    base, _ = _base(config, target, dtype)
    verdict = decide_plan(ask_of(name, dict(config), chip, quant, base, context_length, **wishes))
    verdict.require()
    if verdict.planned:
        raise UsageError(f"{name} fits {chip.name} as {verdict.chosen.title}, but no kernels are written for that yet"
                         + "".join(f"; what can be built: {a['title']}" for a in verdict.alternatives
                                   if not a["planned_only"])[:400])
    return verdict


def decide(traced: Traced, target: Target, verdict: Verdict | None, dtype: str | None, quant: str,
           activations: str | None, context_length: int | None, kv: str | None = None,
           states: str | None = None) -> Decision:
    """What a build does, by the verdict where there is one. Raises UsageError naming what is impossible."""
    reasons: dict[str, str] = {}
    elements = _elements(traced.main)
    base, reasons["dtype"] = _base(traced.config, target, dtype)
    if verdict is None:
        name, reasons["quant"] = _format(quant, elements, target)
        scheme, data = scheme_of(name, "gpu" if target.kind == "gpu" else "cpu", base), {}
        reasons["layout"] = "the planner knows nothing of this model or target"
    else:
        scheme, data = verdict.chosen.scheme, verdict.to_json()
        reasons |= {"quant": verdict.reasons["quant"], "layout": verdict.reasons["layout"]}
    acts = _activations(activations, scheme.formats, target, reasons)
    longest = int(traced.config.get("max_position_embeddings", 32768))
    reasons["context_length"] = "asked for" if context_length else "the model's own limit"
    if verdict is not None and verdict.context < (context_length or longest):
        reasons["context_length"] += f"; {verdict.context:,} tokens fit beside {verdict.ask.slots} states"
    size = int(elements * 4 * stored_fraction(Encoding(scheme.experts)))
    return Decision(base, scheme.name, acts, context_length or longest,
                    data["memory"]["weights"] * verdict.chosen.layout.ranks if verdict else size, reasons,
                    {kind: scheme.format_of(kind) for kind in ("experts", "dense", "head")},
                    verdict.chosen.layout if verdict else Layout(), tuple(data.pop("rejected", ())), data,
                    kv_type(kv, target, reasons), _states(states, traced, target, reasons))


def _elements(graph: Graph) -> int:
    total = 0
    for op in graph.ops:
        if op.name == "weight":
            total += op.result.tensor.bytes() * 8 // op.result.tensor.dtype.bits
    return total


def _base(config: Mapping[str, Any], target: Target, dtype: str | None) -> tuple[str, str]:
    """(f32 or bf16, why)."""
    if target.kind == "gpu":
        return "bf16", "GPU kernels compute on bf16"
    if dtype:
        return DTYPES[dtype], "asked for with --dtype"
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return "bf16" if "bfloat16" in stored else "f32", f"the checkpoint is stored in {stored}"


def _format(quant: str, elements: int, target: Target) -> tuple[str, str]:
    """(scheme, why) without a planner: few bits for big models."""
    if quant != "auto":
        known = ("bf16", "fp8", "int4-g128", "nvfp4") if target.kind == "gpu" else ("f32", "bf16", "int8", "int4")
        if not set(scheme_of(quant, "gpu" if target.kind == "gpu" else "cpu").formats) <= set(known):
            raise UsageError(f"--quant {quant}: no kernels are written for it; {target.name} reads {', '.join(known)}")
        return quant, "asked for with --quant"
    if 2 * elements <= SMALL:
        return "none", f"{2 * elements / 1e6:.1f} MB in bf16 is small: nothing to gain from fewer bits"
    name, bits = ("fp8", 8.0) if target.kind == "gpu" else ("int4", 4.5)
    return name, (f"decode reads every active weight once a token, so bytes are time: {elements * bits / 8 / 1e9:.1f} "
                  f"GB at {name} against {elements * 2 / 1e9:.1f} GB in bf16")


def kv_type(asked: str | None, target: Target, reasons: dict[str, str]) -> str:
    """The type that keys and values are cached in; "bf16" stands for the target's own."""
    if asked is not None and asked not in KV:
        raise UsageError(f"--kv-cache-dtype {asked}: choose {', '.join(KV)}")
    reasons["kv"] = "asked for with --kv-cache-dtype" if asked not in (None, "auto") else "as they are computed"
    found = KV[asked or "auto"]
    if found == "f8e4m3" and target.kind != "gpu":
        raise UsageError(f"--kv-cache-dtype {asked}: the {target.name} target caches keys and values as it computes "
                         "them; leave it out")
    arch = target.describe().get("arch")
    if found == "f8e4m3" and isinstance(arch, int) and arch < FIRST_E4M3:
        raise UsageError(f"--kv-cache-dtype {asked}: {target.name} (sm_{arch}) has no e4m3 numbers; leave it out")
    return found


def _states(asked: str | None, traced: Traced, target: Target, reasons: dict[str, str]) -> str:
    """The type of DeltaNet states: as asked for, else as the checkpoint's config says, else fp32."""
    if asked is not None and asked not in STATES:
        raise UsageError(f"--mamba-ssm-dtype {asked}: choose float32 or bfloat16")
    config = str(traced.config.get("mamba_ssm_dtype") or "float32")
    reasons["states"] = "asked for with --mamba-ssm-dtype" if asked else "the checkpoint's config, or the default"
    return STATES.get(asked or config, "f32")


def _activations(asked: str | None, formats: tuple[str, ...], target: Target, reasons: dict[str, str]) -> str:
    floats = not {"int8", "int4"} & set(formats)
    check_choices(target.kind, target.name, None, "none" if floats else "auto", asked)
    if target.kind == "gpu":
        reasons["activations"] = "GPU kernels multiply bf16 activations"
        return "f32"
    if asked:
        reasons["activations"] = "asked for with --activations"
        return "int8" if asked == "int8" else "f32"
    reasons["activations"] = "float weights" if floats else "int8 products are twice as fast on this target"
    return "f32" if floats else "int8"
