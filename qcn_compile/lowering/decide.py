"""decide: weight format, activations and context length for a target, each with its reason."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

from qcn_compile.errors import UsageError
from qcn_compile.frontend import Traced
from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.graph import Graph
from qcn_compile.lowering.schedule import stored_fraction
from qcn_compile.targets.base import Target

QUANTS = {"cpu": ("none", "int8", "int4"), "null": ("none", "int8", "int4"), "gpu": ("none", "fp8")}
DTYPES = {"fp32": "f32", "bf16": "bf16"}
KV = {"auto": "bf16", "bf16": "bf16", "fp8": "f8e4m3", "fp8_e4m3": "f8e4m3"}  # by SGLang's names
FIRST_E4M3 = 89  # cards from this architecture on convert e4m3
STATES = {"float32": "f32", "bfloat16": "bf16"}  # of DeltaNet, by SGLang's names
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
    states: str = "f32"
    kv: str = "bf16"

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def decide(traced: Traced, target: Target, dtype: str | None, quant: str, activations: str | None,
           context_length: int | None, states: str | None = None, kv: str | None = None) -> Decision:
    """Resolve the user's wishes. Raises UsageError naming what is impossible, with the number that breaks it."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: choose fp32 or bf16")
    reasons: dict[str, str] = {}
    elements = _elements(traced.main)
    base = _base(traced, target, dtype, reasons)
    format_ = _format(quant, elements, target, reasons)
    acts = _activations(activations, format_, target, reasons)
    longest = int(traced.config.get("max_position_embeddings", 32768))
    if context_length is not None and context_length > longest:
        raise UsageError(f"--context-length {context_length}: the model was made for at most {longest} tokens; "
                         f"ask for {longest} or less")
    if context_length is not None and context_length < 1:
        raise UsageError(f"--context-length {context_length}: must be at least 1")
    reasons["context_length"] = "asked for" if context_length else "the model's own limit"
    kept_states = _states(states, traced, target, reasons)
    kept = base if format_ == "none" else format_
    size = int(elements * 4 * stored_fraction(Encoding(kept)))
    return Decision(base, format_, acts, context_length or longest, size, reasons, kept_states,
                    kv_type(kv, target, reasons))


def _elements(graph: Graph) -> int:
    total = 0
    for op in graph.ops:
        if op.name == "weight":
            total += op.result.tensor.bytes() * 8 // op.result.tensor.dtype.bits
    return total


def _base(traced: Traced, target: Target, dtype: str | None, reasons: dict[str, str]) -> str:
    if target.kind == "gpu":
        if dtype == "fp32":
            raise UsageError("--dtype fp32: GPU kernels read bf16 and fp8 weights; leave --dtype out")
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
    known = QUANTS[target.kind]
    if quant in known:
        reasons["quant"] = "asked for with --quant"
        return quant
    if quant != "auto":
        raise UsageError(f"--quant {quant}: the {target.name} target has {', '.join(known)} or auto"
                         + (" (fp8 is a GPU format)" if quant == "fp8" else ""))
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


def _activations(asked: str | None, format_: str, target: Target, reasons: dict[str, str]) -> str:
    if target.kind == "gpu":
        if asked:
            raise UsageError(f"--activations {asked}: GPU kernels multiply bf16 activations; leave --activations out")
        reasons["activations"] = "GPU kernels multiply bf16 activations"
        return "f32"
    if asked not in (None, "fp32", "int8"):
        raise UsageError(f"--activations {asked}: choose fp32 or int8")
    if asked == "int8" and format_ == "none":
        raise UsageError("--activations int8 needs --quant int8 or int4: float weights take float activations")
    if asked:
        reasons["activations"] = "asked for with --activations"
        return "int8" if asked == "int8" else "f32"
    reasons["activations"] = "float weights" if format_ == "none" else "int8 products are twice as fast on this target"
    return "f32" if format_ == "none" else "int8"
