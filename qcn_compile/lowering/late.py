"""Weights that a build leaves out: bound later from a checkpoint (`late`) or made up on the device (`dummy`).

A late blob is a recipe: a list of steps, each an op over earlier steps ("args" are their numbers), the last one the
weight, which `runtime/late_weights.py` evaluates with NumPy and packs. A dummy blob is a number of bytes and a kind of
filling. What depends on no checkpoint tensor (rotary frequencies) is written into the build in every mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcn_compile.artifact import ALIGNMENT
from qcn_compile.errors import LoweringError
from qcn_compile.ir.graph import Op, Value
from qcn_compile.ir.types import DType
from qcn_compile.lowering.weights import BlobKey, sources
from qcn_compile.targets.base import Target

STEPS = ("weight", "concat", "reshape", "take_rows", "add_scalar", "mul_scalar", "neg", "exp", "cast", "transpose",
         "slice")


def deferred(names: dict[BlobKey, str], target: Target, mode: str, stored: Mapping[str, list[str]] | None = None
             ) -> tuple[dict[str, Any], dict[BlobKey, str]]:
    """(what the manifest says of the blobs left out, the blobs to write now). stored: weight -> its checkpoint keys,
    `*` for the expert, where these are not its own name."""
    if mode == "copied":
        return {}, names
    now = {key: name for key, name in names.items() if not sources(key.value)}
    left = {key: name for key, name in names.items() if key not in now}
    if mode == "dummy":
        return {"blobs": {f"{name}.{part}": {"bytes": size, "fill": kind} for key, name in left.items()
                          for part, (kind, size) in sizes(key, target).items()}}, now
    return {"recipes": {name: recipe(key, target, stored or {}) for key, name in left.items()}}, now


def sizes(key: BlobKey, target: Target) -> dict[str, tuple[str, int]]:
    """Part -> (element type, bytes in whole lines) of a blob."""
    made = target.packed_sizes(key.layout, key.encoding, key.shape)
    return {part: (kind, -(-size // ALIGNMENT) * ALIGNMENT) for part, (kind, size) in made.items()}


def recipe(key: BlobKey, target: Target, stored: Mapping[str, list[str]]) -> dict[str, Any]:
    """The steps to a blob, its layout and format, and the bytes of its parts."""
    steps: list[dict[str, Any]] = []
    place: dict[Value, int] = {}

    def visit(value: Value) -> int:
        if value not in place:
            assert value.op is not None
            step = _step(value.op, stored)
            step["args"] = [visit(v) for v in value.op.inputs]
            steps.append(step)
            place[value] = len(steps) - 1
        return place[value]

    visit(key.value)
    return {"steps": steps, "layout": key.layout, "format": key.encoding.format,
            "parts": {part: size for part, (_, size) in sizes(key, target).items()}}


def _step(op: Op, stored: Mapping[str, list[str]]) -> dict[str, Any]:
    """One op of a recipe. Raises LoweringError for an op that the runtime cannot evaluate."""
    if op.name not in STEPS:
        raise LoweringError(f"{op.name} at {op.loc}: a late-bound weight may be made by {', '.join(STEPS)} only; "
                            "build with --weights copied")
    attrs = {name: _plain(value) for name, value in op.attrs.items()}
    step: dict[str, Any] = {"op": op.name, **attrs}
    if op.name != "weight":
        return step
    name = str(attrs["name"])
    keys = stored.get(name, [])
    if len(keys) == 1 and "*" not in keys[0]:
        step["name"] = keys[0]
    elif merged := keys or merged_names(name):
        step["merged"] = merged
    return step


def _plain(value: object) -> object:
    if isinstance(value, DType):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def merged_names(name: str) -> list[str]:
    """Checkpoint names of the experts behind a stacked parameter, `*` for the expert: gate and up are one above the
    other. Empty for any other parameter."""
    stem, _, last = name.rpartition(".")
    if not stem.endswith(".experts"):
        return []
    return {"gate_up_proj": [f"{stem}.*.gate_proj.weight", f"{stem}.*.up_proj.weight"],
            "down_proj": [f"{stem}.*.down_proj.weight"]}.get(last, [])
