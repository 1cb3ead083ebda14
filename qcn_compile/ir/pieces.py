"""Moving parts of weights that may be quantised already: codes stay codes as long as no group of a scale is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from qcn_compile.ir.encoding import GROUP, Coded, wide
from qcn_compile.ir.fp8 import BLOCK

Piece: TypeAlias = Tensor | Coded


def unit(x: Coded, axis: int) -> int:
    """How many values along an axis share a scale."""
    from_end = x.codes.ndim - axis
    if x.encoding.format == "fp8":
        return BLOCK if from_end <= 2 else 1
    return GROUP if from_end == 1 else 1


def length(x: Piece, axis: int) -> int:
    """Values along an axis."""
    return x.size if isinstance(x, Coded) and axis == x.codes.ndim - 1 else len_of(x, axis)


def len_of(x: Piece, axis: int) -> int:
    """Length along an axis, padding included."""
    return int((x.codes if isinstance(x, Coded) else x).shape[axis])


def narrow(x: Piece, axis: int, start: int, stop: int) -> Piece:
    """x[start:stop] along an axis; in f32 when that cuts through a group of one scale."""
    if isinstance(x, Tensor):
        return x.narrow(axis, start, stop - start)
    step, whole = unit(x, axis), stop == length(x, axis)
    if start % step or (stop % step and not whole):
        return x.wide().narrow(axis, start, stop - start)
    last = len_of(x, axis) if whole else stop
    codes = x.codes.narrow(axis, start, last - start)
    scales = x.scales.narrow(axis, start // step, -(-last // step) - start // step)
    return Coded(codes, scales, x.encoding, stop - start if axis == x.codes.ndim - 1 else x.size)


def cat(parts: Sequence[Piece], axis: int) -> Piece:
    """One after the other; in f32 when some are stored otherwise, or one ends inside a group of one scale."""
    first = parts[0]
    if len(parts) == 1:
        return first
    coded = [p for p in parts if isinstance(p, Coded)]
    if not coded:
        return torch.cat([p for p in parts if isinstance(p, Tensor)], axis)
    last_axis = isinstance(first, Coded) and axis == first.codes.ndim - 1
    if len(coded) < len(parts) or len({p.encoding for p in coded}) > 1 or any(
            length(p, axis) % unit(p, axis) for p in coded[:-1]):
        return torch.cat([wide(p) for p in parts], axis)
    return Coded(torch.cat([p.codes for p in coded], axis), torch.cat([p.scales for p in coded], axis),
                 coded[0].encoding, sum(p.size for p in coded) if last_axis else coded[0].size)


def reshape(x: Piece, shape: tuple[int, ...]) -> Piece:
    """In f32 when more than leading axes change."""
    if isinstance(x, Tensor):
        return x.reshape(shape)
    if tuple(shape[-2:]) != (len_of(x, -2), x.size):
        return x.wide().reshape(shape)
    lead = shape[:-2]
    return Coded(x.codes.reshape(*lead, *x.codes.shape[-2:]), x.scales.reshape(*lead, *x.scales.shape[-2:]),
                 x.encoding, x.size)
