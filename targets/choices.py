"""Which formats go with which kind of target: checked before anything heavy is imported, and again when decided."""

from __future__ import annotations

from qcn_compile.errors import UsageError

_CPU = ("none", "int8", "int4-experts", "int4")
QUANTS = {"cpu": _CPU, "null": _CPU, "gpu": ("none", "fp8", "int4-experts", "nvfp4")}
DTYPES = {"fp32": "f32", "bf16": "bf16"}


def check_choices(kind: str, name: str, dtype: str | None, quant: str, activations: str | None) -> None:
    """Raise UsageError for a choice that a kind of target cannot build."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: choose {' or '.join(DTYPES)}")
    if kind == "gpu" and dtype == "fp32":
        raise UsageError("--dtype fp32: GPU kernels read bf16 and fp8 weights; leave --dtype out")
    if quant not in ("auto", *QUANTS[kind]) and "=" not in quant:  # a format for each class is the planner's to read
        raise UsageError(f"--quant {quant}: the {name} target has {', '.join(QUANTS[kind])} or auto"
                         + (" (fp8 is a GPU format)" if quant == "fp8" else ""))
    if kind == "gpu" and activations:
        raise UsageError(f"--activations {activations}: GPU kernels multiply bf16 activations; leave --activations out")
    if activations not in (None, "fp32", "int8"):
        raise UsageError(f"--activations {activations}: choose fp32 or int8")
    if activations == "int8" and quant == "none":
        raise UsageError("--activations int8 needs --quant int8 or int4: float weights take float activations")
