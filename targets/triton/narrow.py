"""Activations in e4m3 from the kernel that makes them: ops that only plans of many tokens have, and where they go.

The products of such plans multiply e4m3 with e4m3. Where only that rounding lies between the maker of an activation and
a product, the maker does it. Codes f8e4m3 [T, K] lie beside scales f32 [T, K/128]: the largest of 128 becomes 448.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcn_compile.ir.graph import Op, Value
from qcn_compile.ir.ops.deltanet import delta_net
from qcn_compile.ir.ops.linear import linear
from qcn_compile.ir.ops.moe import moe_experts
from qcn_compile.ir.ops.norm import rms_norm
from qcn_compile.ir.optable import TABLE, op
from qcn_compile.ir.types import DType, TensorType

GROUP = 128
MAKERS = {"rms_norm": "narrow_rms_norm", "delta_net": "narrow_delta_net"}
PRODUCTS = {"linear": 1, "linear_add": 1, "moe_experts": 3, "moe_add": 3}  # op: its operand that must be in fp8


def codes_of(x: TensorType) -> tuple[TensorType, TensorType]:
    """Types of the codes and scales of a bf16 [T, K]."""
    return TensorType(DType.f8e4m3, x.shape), TensorType(DType.f32, (x.shape[0], int(x.shape[1]) // GROUP))  # type: ignore[arg-type]


def narrow(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of x [T, K]; the codes as f32 numbers."""
    groups = x.float().reshape(x.shape[0], -1, GROUP)
    scales = groups.abs().amax(-1).clamp_min(1e-12) / 448
    return (groups / scales[..., None]).to(torch.float8_e4m3fn).float().reshape(x.shape), scales


def widened(codes: Tensor, scales: Tensor) -> Tensor:
    """The activation that codes and scales stand for."""
    return codes.float() * scales.repeat_interleave(GROUP, -1)


@op("narrow_rms_norm", "x, w", eps=float, infer=lambda x, w, **_: (x, *codes_of(x)))
def narrow_rms_norm(x: Tensor, w: Tensor, *, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, codes, scales) with y = rms_norm(x, w). x [T, K], w [K]."""
    y = rms_norm(x, w, eps=eps)
    return y, *narrow(y)


_DELTA, _EXPERTS = TABLE["delta_net"], TABLE["moe_experts"]


@op("narrow_delta_net", "qkv, z, b, a, conv_w, decay, dt_bias, norm_w, batch",
    key_heads=int, value_heads=int, key_dim=int, value_dim=int, eps=float, conv=None, delta=None, rounds=None,
    effects=_DELTA.effects, flops=_DELTA.flops, infer=lambda *types, **attrs: codes_of(_DELTA.infer(*types, **attrs)))  # type: ignore[arg-type]
def narrow_delta_net(*operands: Any, **attrs: Any) -> tuple[Tensor, Tensor]:
    """(codes, scales) of delta_net of the same operands."""
    return narrow(delta_net(*operands, **attrs))


@op("narrow_linear", "codes, scales, w, r?", flops=lambda types, results, attrs, sizes: TABLE["linear"].flops(  # type: ignore[misc]
    [types[0], types[2]], results, attrs, sizes),
    infer=lambda codes, scales, w, r=None: TensorType(DType.bf16, (codes.shape[0], w.shape[0])))
def narrow_linear(codes: Tensor, scales: Tensor, w: Tensor, r: Tensor | None) -> Tensor:
    """x w^T (+ r) of an x in e4m3. w [N, K] -> [T, N]."""
    y = linear(widened(codes, scales), w, None)
    return y if r is None else y + r


@op("narrow_experts", "codes, scales, ids, weights, gate_up, down, r?", activation=str,
    infer=lambda codes, *_, **__: TensorType(DType.bf16, codes.shape),
    flops=lambda types, results, attrs, sizes: _EXPERTS.flops([types[0], *types[2:]], results, attrs, sizes),  # type: ignore[misc]
    touched=lambda types, sizes: {i + 1: share for i, share in _EXPERTS.touched([types[0], *types[2:]], sizes).items()})  # type: ignore[misc]
def narrow_experts(codes: Tensor, scales: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor,
                   r: Tensor | None, *, activation: str) -> Tensor:
    """(r +) moe_experts of an x in e4m3."""
    y = moe_experts(widened(codes, scales), ids, weights, gate_up, down, activation=activation)
    return y if r is None else r + y


def narrowing(ops: Sequence[Op], outputs: Sequence[Value], steps: bool) -> list[Op]:
    """The ops with the rounding to e4m3 in the makers of activations, where these and the products allow it, and where
    that was found to be faster: not in attention, and not in the delta rule of `steps` (plans of one token a sequence).
    """
    readers: dict[Value, list[Op]] = {}
    for op_ in ops:
        for value in dict.fromkeys(op_.inputs):
            readers.setdefault(value, []).append(op_)
    swapped: dict[int, Op] = {}
    for maker in ops:
        if maker.name in MAKERS and not (steps and maker.name == "delta_net") and _groups(maker.result.tensor):
            _narrow(maker, readers.get(maker.result, []), maker.result in outputs, swapped)
    return [swapped.get(id(op_), op_) for op_ in ops]


def _groups(x: TensorType) -> bool:
    """Whether rows of x are whole groups."""
    return x.rank == 2 and int(x.shape[1]) % GROUP == 0  # type: ignore[arg-type]


def _narrow(maker: Op, readers: list[Op], returned: bool, swapped: dict[int, Op]) -> None:
    """Swap a maker and the products that read it."""
    products = [r for r in readers if _product(r, maker.result)]
    keeps = maker.name == "rms_norm"
    if not products or (not keeps and (returned or len(products) < len(readers))):
        return
    if maker.name == "delta_net" and maker.attrs["value_dim"] != GROUP:
        return
    swap = Op(MAKERS[maker.name], list(maker.operands), [], dict(maker.attrs), maker.loc)
    types = codes_of(maker.result.tensor)
    made = [Value(f"{maker.result.name}.{part}", types[i], swap) for i, part in enumerate(("codes", "scales"))]
    swap.results = [maker.result, *made] if keeps else made
    swapped[id(maker)] = swap
    for product in products:
        name = "narrow_linear" if product.name in ("linear", "linear_add") else "narrow_experts"
        swapped[id(product)] = Op(name, [*made, *product.operands[1:]], list(product.results), dict(product.attrs),
                                  product.loc)


def _product(reader: Op, x: Value) -> bool:
    """Whether an op multiplies x with fp8 weights, and reads it nowhere else. A bias would need a kernel of its own."""
    if reader.name not in PRODUCTS or reader.operands[0] is not x or x in reader.operands[1:]:
        return False
    weights = [reader.operands[i] for i in range(PRODUCTS[reader.name], PRODUCTS[reader.name] + 1)]
    if reader.name == "linear" and any(v is not None for v in reader.operands[2:]):
        return False
    return all(w is not None and w.op is not None and w.op.attrs.get("format") == "fp8" for w in weights)
