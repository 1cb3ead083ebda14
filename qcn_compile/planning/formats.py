"""Weight formats by class of weight: their bits, and which scheme stores what how."""

from __future__ import annotations

from dataclasses import dataclass

from qcn_compile.errors import UsageError

EXPERTS_ONLY = ("int4-g128", "nvfp4")  # formats of four bits that only the kernels of experts on GPUs read
CLASSES = ("experts", "dense", "head", "embedding", "sensitive", "vectors")
"""experts: routed and shared. dense: projections around the mixers. head: lm_head. embedding: the token table.
sensitive: router, shared expert's gate, DeltaNet's b and a. vectors: norms, convolution, decay."""

BITS = {"f32": 32.0, "bf16": 16.0, "fp8": 8 + 32 / 128**2, "int8": 8 + 16 / 32, "int4": 4 + 16 / 32,
        "int4-g128": 4 + 16 / 128, "nvfp4": 4 + 8 / 16, "mxfp4": 4 + 8 / 32}
"""Stored bits of a weight, scales included: fp8 one f32 a block of 128 x 128, int8 and int4 one f16 a group of 32
(GPU: of 128), nvfp4 one e4m3 a group of 16, mxfp4 one e8m0 a group of 32."""

MATH = {"f32": "bf16", "bf16": "bf16", "fp8": "fp8", "int8": "int8", "int4": "int8", "int4-g128": "int8",
        "nvfp4": "fp4", "mxfp4": "fp4"}
"""The rate of `Hardware.rates` that products in a format can reach at best."""


@dataclass(frozen=True)
class Scheme:
    """One way to store a model: the format of each class of weights that may differ; `name` as --quant takes it."""

    name: str
    experts: str
    dense: str
    head: str
    base: str = "bf16"

    def format_of(self, kind: str) -> str:
        """The format of a class of CLASSES."""
        if kind in ("experts", "dense", "head"):
            return str(getattr(self, kind))
        return "f32" if kind == "vectors" else self.base

    def bits(self, kind: str) -> float:
        """Stored bits of one weight of a class."""
        return BITS[self.format_of(kind)]

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats it uses for big weights."""
        return tuple(dict.fromkeys((self.experts, self.dense, self.head)))


def schemes(kind: str, base: str = "bf16") -> list[Scheme]:
    """The schemes of a kind of target (cpu or gpu), most precise first."""
    def uniform(name: str, format_: str) -> Scheme:
        return Scheme(name, format_, format_, format_, base)

    if kind == "cpu":
        return [uniform("none", base), uniform("int8", "int8"), Scheme("int4-experts", "int4", "int8", "int8", base),
                uniform("int4", "int4")]
    return [uniform("none", base), uniform("int8", "int8"), uniform("fp8", "fp8"),
            Scheme("int4-experts", "int4-g128", "fp8", "fp8", base), uniform("int4", "int4-g128"),
            Scheme("nvfp4", "nvfp4", "fp8", "fp8", base), Scheme("mxfp4", "mxfp4", "fp8", "fp8", base)]


def scheme_of(name: str, kind: str, base: str = "bf16") -> Scheme:
    """The scheme that --quant names: one of `schemes`, or a format for each class, `experts=int4,dense=int8,head=none`.

    A class that is not named keeps the base dtype. Raises UsageError listing what there is.
    """
    known = {scheme.name: scheme for scheme in schemes(kind, base)}
    if name in known:
        return known[name]
    parts = dict(part.partition("=")[::2] for part in name.split(","))
    formats = {s.experts for s in known.values()} | {s.head for s in known.values()} | {"none"}
    if set(parts) <= {"experts", "dense", "head"} and set(parts.values()) <= formats:
        chosen = {part: base if parts.get(part, "none") == "none" else parts[part] for part in CLASSES[:3]}
        return Scheme(name, **chosen, base=base)
    raise UsageError(f"--quant {name}: a {kind} has auto, {', '.join(known)}, or a format for each class of weights, "
                     f"as in experts=FORMAT,dense=FORMAT,head=FORMAT with {', '.join(sorted(formats))}")
