"""How a weight may be stored: one tensor, or codes with their scales. What belongs together, and reading some rows.

    plain            X                       bf16, f16, f32
    fp8 blocks       X, X_scale_inv          e4m3, one scale per 128 x 128 (DeepSeek, Qwen); also stacked experts
    fp8, int8        X, X_scale              one scale per block, per row or for the whole (compressed-tensors)
    int4             X_packed, X_scale, [X_zero_point, X_g_idx, X_shape]   (compressed-tensors, pack-quantized)
    GPTQ, AWQ        qweight, qzeros, scales, [g_idx]                      int4, X is the module's weight

Codes stay codes when our own formats hold them exactly: fp8 blocks, and int4 in groups of a multiple of 32, symmetric
ones as int4, those with zero points as int8.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from qcn_compile.frontend.tensor_files import Stored
from qcn_compile.ir.encoding import GROUP, Coded, Encoding
from qcn_compile.ir.fp8 import BLOCK
from qcn_compile.ir.pieces import Piece

Roles = dict[str, tuple[str, Stored]]  # role -> name of the tensor, the tensor
Reader = Callable[[int, int], Piece]
FLOATS = ("BF16", "F16", "F32", "F64")
FP8 = Encoding("fp8", BLOCK)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which nibble of a word holds the column 0, 1, 2, ...
SUFFIXES = {"_scale_inv": "scale_inv", "_scale": "scale", "_packed": "packed", "_zero_point": "zeros",
            "_g_idx": "g_idx", "_shape": "shape"}
MODULE = {"qweight": "qweight", "qzeros": "qzeros", "scales": "scales", "g_idx": "module_g_idx"}
ACTIVATIONS = (".input_scale", ".output_scale", ".k_scale", ".v_scale", ".input_zero_point", ".input_global_scale")


@dataclass(frozen=True)
class StoredWeight:
    """A weight of a checkpoint: its shape, the tensors it is stored in, and a reader of rows start..stop."""

    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    reader: Reader
    plain: bool

    def read(self, start: int = 0, stop: int | None = None) -> Piece:
        """Rows of the first axis, as stored; in f32 when codes would be cut. Any thread may call it."""
        return self.reader(start, self.shape[0] if stop is None and self.shape else stop or 0)


@dataclass
class Grouped:
    """Weights by name; tensors that are not needed, by reason; and what is wrong with the others."""

    weights: dict[str, StoredWeight] = field(default_factory=dict)
    ignored: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    wrong: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


Made = tuple[tuple[int, ...], Reader | None, str]  # shape, reader, or a fault


@dataclass(frozen=True)
class Form:
    """One way to store a weight: the roles it needs, those it may have, and what makes a reader of them."""

    needs: tuple[str, ...]
    allowed: tuple[str, ...]
    make: Callable[[Roles, dict[str, Any]], Made]


def group(tensors: dict[str, Stored], scheme: dict[str, Any]) -> Grouped:
    """The weights that tensors make up. `scheme` is the checkpoint's quantization_config, empty when it has none."""
    roles: dict[str, Roles] = defaultdict(dict)
    result = Grouped()
    for name, stored in tensors.items():
        if name.endswith(ACTIVATIONS):
            result.ignored["scales of activations, which kernels take from the activations themselves"].append(name)
        else:
            weight, role = _role(name)
            roles[weight][role] = name, stored
    for weight, parts in roles.items():
        _place(weight, parts, scheme, result)
    return result


def _role(name: str) -> tuple[str, str]:
    """The weight a tensor belongs to, and what it is of it."""
    stem, _, last = name.rpartition(".")
    if last in MODULE:
        return f"{stem}.weight", MODULE[last]
    for suffix, role in SUFFIXES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), role
    return name, "weight"


def _place(weight: str, parts: Roles, scheme: dict[str, Any], result: Grouped) -> None:
    """One weight, or the faults of its tensors."""
    form = _form(parts)
    if form is None:
        result.extra += [name for name, _ in parts.values()]
        return
    result.extra += [name for role, (name, _) in parts.items() if role not in (*form.needs, *form.allowed)]
    taken = {role: part for role, part in parts.items() if role in (*form.needs, *form.allowed)}
    absent = [_name_of(weight, role) for role in form.needs if role not in parts]
    result.missing += absent
    shape, reader, fault = form.make(taken, scheme) if not absent else ((), None, "")
    if fault:
        result.wrong[fault].append(taken[form.needs[-1]][0])
    if reader is None and "weight" in parts:  # its shape can be checked all the same
        shape, reader = parts["weight"][1].shape, parts["weight"][1].read
    if reader is not None:
        tensors = tuple(name for name, _ in taken.values())
        result.weights[weight] = StoredWeight(shape, tensors, reader, form.make is _plain)


def _form(parts: Roles) -> Form | None:
    """Which of the forms the tensors of a weight are meant to be."""
    if "qweight" in parts:
        return Form(("qweight", "qzeros", "scales"), ("module_g_idx",), _module_int4)
    if "packed" in parts:
        return Form(("packed", "scale"), ("zeros", "g_idx", "shape"), _packed)
    if "weight" not in parts:
        return None
    if parts["weight"][1].dtype in FLOATS:
        return Form(("weight",), (), _plain)
    return Form(("weight", "scale" if "scale" in parts and "scale_inv" not in parts else "scale_inv"), (), _scaled)


def _name_of(weight: str, role: str) -> str:
    """How the tensor of a role is called."""
    module = {role: name for name, role in MODULE.items()}
    if role in module:
        return weight.removesuffix("weight") + module[role]
    return weight + next((suffix for suffix, r in SUFFIXES.items() if r == role), "")


def _plain(parts: Roles, scheme: dict[str, Any]) -> Made:
    stored = parts["weight"][1]
    return stored.shape, stored.read, ""


def _scaled(parts: Roles, scheme: dict[str, Any]) -> Made:
    """Codes [.., N, K] with scales per block, per row, or one."""
    codes = parts["weight"][1]
    scales = (parts.get("scale_inv") or parts["scale"])[1]
    if codes.dtype not in ("F8_E4M3", "I8") or len(codes.shape) < 2:
        return (), None, f"has codes in {codes.dtype} {list(codes.shape)}, which is no known format"
    block = scheme.get("weight_block_size") or [BLOCK, BLOCK]
    wanted = tuple(-(-n // b) for n, b in zip(codes.shape[-2:], block, strict=True))
    if "scale_inv" in parts and scales.shape != (*codes.shape[:-2], *wanted):
        return (), None, f"is {list(scales.shape)}, its weight {list(codes.shape)} wants {[*codes.shape[:-2], *wanted]}"
    if scales.shape == (*codes.shape[:-2], *wanted) and codes.dtype == "F8_E4M3":
        return codes.shape, partial(_read_blocks, codes, scales, tuple(block)), ""
    if prod(scales.shape) == 1 or scales.shape == (codes.shape[0], 1):
        return codes.shape, partial(_read_rows, codes, scales), ""
    return (), None, f"is {list(scales.shape)}, its weight {list(codes.shape)} wants one scale, or one a row or block"


def _read_blocks(codes: Stored, scales: Stored, block: tuple[int, int], start: int, stop: int) -> Piece:
    """Blocks of 128 x 128 stay as they are when whole; others come in f32."""
    stacked = len(codes.shape) > 2
    unit = 1 if stacked else block[0]
    first, last = start // unit * unit, min(-(-stop // unit) * unit, codes.shape[0])
    raw, factors = codes.read(first, last), scales.read(first // unit, -(-last // unit)).float()
    if block != (BLOCK, BLOCK):
        wide = factors.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
        return (raw.float() * wide[..., :raw.shape[-2], :raw.shape[-1]])[start - first:stop - first]
    coded = Coded(raw.view(torch.uint8), factors, FP8, codes.shape[-1])
    return coded if (first, last) == (start, stop) else coded.wide()[start - first:stop - first]


def _read_rows(codes: Stored, scales: Stored, start: int, stop: int) -> Tensor:
    factors = scales.read().reshape(-1, 1).float()
    return codes.read(start, stop).float() * (factors if len(factors) == 1 else factors[start:stop])


def _packed(parts: Roles, scheme: dict[str, Any]) -> Made:
    """X_packed i32 [N, K/8], the first of eight codes in the low bits; X_scale [N, groups]."""
    packed, scales = parts["packed"][1], parts["scale"][1]
    if packed.dtype != "I32" or len(packed.shape) != 2:
        return (), None, f"belongs to codes in {packed.dtype} {list(packed.shape)}; known are I32 words of a matrix"
    rows, depth = packed.shape[0], packed.shape[1] * 8
    if len(scales.shape) != 2 or scales.shape[0] != rows or depth % scales.shape[1]:
        return (), None, f"is {list(scales.shape)}, its weight {[rows, depth]} wants [{rows}, a divisor of {depth}]"
    zeros, order = ((parts[role][1] if role in parts else None) for role in ("zeros", "g_idx"))
    return (rows, depth), partial(_read_packed, packed, scales, zeros, order), ""


def _read_packed(packed: Stored, scales: Stored, zeros: Stored | None, order: Stored | None,
                 start: int, stop: int) -> Piece:
    codes = nibbles(packed.read(start, stop)).to(torch.int8) - 8
    offsets = None
    if zeros is not None:  # i32 [N/8, groups]
        offsets = nibbles(zeros.read().T.contiguous()).T[start:stop].to(torch.int8) - 8
    return grouped(codes, scales.read(start, stop), offsets, None if order is None else order.read())


def _module_int4(parts: Roles, scheme: dict[str, Any]) -> Made:
    """GPTQ: qweight i32 [K/8, N]; AWQ: qweight i32 [K, N/8]; qzeros i32 [groups, N/8], scales [groups, N]."""
    words, zeros, scales = (parts[role][1] for role in ("qweight", "qzeros", "scales"))
    if words.dtype != "I32" or len(words.shape) != 2 or len(scales.shape) != 2:
        return (), None, f"belongs to codes in {words.dtype} {list(words.shape)}; known are I32 words of a matrix"
    groups, rows = scales.shape
    awq = scheme.get("quant_method") == "awq"
    depth, width = (words.shape[0], words.shape[1] * 8) if awq else (words.shape[0] * 8, words.shape[1])
    if width != rows or depth % groups or zeros.shape != (groups, rows // 8):
        return (), None, (f"is {list(scales.shape)} and qzeros {list(zeros.shape)}, but qweight {list(words.shape)} "
                          f"wants [groups, {width}] and [groups, {width // 8}]")
    if awq:
        return (rows, depth), partial(_read_awq, words, zeros, scales), ""
    shift = 0 if scheme.get("checkpoint_format") == "gptq_v2" else 1  # the first format stores zeros less one
    order = parts["module_g_idx"][1] if "module_g_idx" in parts else None
    return (rows, depth), partial(_read_gptq, words, zeros, scales, order, shift), ""


def _read_gptq(words: Stored, zeros: Stored, scales: Stored, order: Stored | None, shift: int,
               start: int, stop: int) -> Piece:
    codes = nibbles(words.read()[:, start:stop].T.contiguous()).to(torch.int8)
    offsets = (nibbles(zeros.read())[:, start:stop].T + shift).to(torch.int8)
    return grouped(codes - 8, scales.read()[:, start:stop].T, offsets - 8, None if order is None else order.read())


def _read_awq(words: Stored, zeros: Stored, scales: Stored, start: int, stop: int) -> Piece:
    codes = nibbles(words.read(), AWQ_ORDER)[:, start:stop].T.to(torch.int8)
    offsets = nibbles(zeros.read(), AWQ_ORDER)[:, start:stop].T.to(torch.int8)
    return grouped(codes - 8, scales.read()[:, start:stop].T, offsets - 8, None)


def nibbles(words: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """i32 [..., W] -> the 4-bit numbers 0..15 in it, [..., 8 W]; `order` tells which nibble comes first, second, ..."""
    shifts = torch.tensor([4 * place for place in order], dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).reshape(*words.shape[:-1], -1)


def grouped(codes: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None) -> Piece:
    """(code - zero) * scale. codes i8 -8..7 [N, K], scales and zeros [N, groups], order [K]: the group of each input.

    Codes in whole groups of 32 with scales that f16 holds stay codes; less zeros other than 0 they are int8.
    """
    depth = codes.shape[1]
    size = depth // scales.shape[1]
    if order is not None:
        plain = torch.equal(order.long(), torch.arange(depth) // size)
        order = None if plain or bool((order < 0).any()) else order.long()
    half = scales.half()
    if torch.equal(half.float(), scales.float()) and order is None and size % GROUP == 0:
        symmetric = zeros is None or not bool(zeros.any())
        if zeros is not None and not symmetric:
            codes = codes - zeros.repeat_interleave(size, 1)
        return Coded(codes.contiguous(), half.repeat_interleave(size // GROUP, 1),
                     Encoding("int4" if symmetric else "int8"), depth)
    place = torch.arange(depth) // size if order is None else order
    offsets = 0 if zeros is None else zeros.float()[:, place]
    return (codes.float() - offsets) * scales.float()[:, place]
