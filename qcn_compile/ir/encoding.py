"""What a stored number means: quantisation of weights and of activations.

Weights are cut along K into groups of 32; a group shares one f16 scale. `dequantize(quantize(w))` is the weight that a
kernel multiplies with, so it is the reference of every quantised kernel and of the IR op that encodes a weight.

    int8   codes -127..127, scale = max|w| / 127
    int4   codes -8..7, scale = -(the value of largest magnitude) / 8, so that this value is hit exactly (as in Q4_0);
           of two that are equally large, the positive one
    bf16   codes are bit patterns, rounded to nearest even; no scales
    fp8    e4m3 codes, one f32 scale per block of 128 x 128 (GPU; see `fp8`)
    nvfp4  e2m1 codes, one e4m3 scale per 16 of a row, one f32 scale per matrix (GPU; see `fp4`)
    int4-g128  int4 with a scale for 128 (GPU; see `int4`)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from qcn_compile.errors import UsageError
from qcn_compile.ir import fp4, fp8, int4


@dataclass(frozen=True)
class Encoding:
    """How a weight is stored: f32, bf16, int8 or int4 (symmetric, one scale per `group` inputs), and the dtype of
    the activations it is multiplied with (f32 or int8)."""

    format: str = "f32"
    group: int = 32
    activations: str = "f32"


@dataclass(frozen=True)
class Coded:
    """A weight that is quantised already: codes and scales as `quantize` makes them, `size` values in a row."""

    codes: Tensor
    scales: Tensor
    encoding: Encoding
    size: int

    def wide(self) -> Tensor:
        """The f32 values [..., N, size]."""
        return torch.from_numpy(dequantize(self.codes.numpy(), self.scales.numpy(), self.encoding, self.size))


Weight: TypeAlias = np.ndarray | Tensor | Coded
GROUP = 32
FORMATS = ("f32", "bf16", "int8", "int4")
LIMITS = {"int8": (-127, 127), "int4": (-8, 7)}
TINY = 1e-30  # groups smaller than this are all zero
F16_MAX = 65504.0


def check(encoding: Encoding) -> None:
    """Raises UsageError, naming the cure, for an encoding that no kernel reads."""
    if encoding.format not in FORMATS:
        raise UsageError(f"weight format {encoding.format!r} is unknown here; choose one of {', '.join(FORMATS)}")
    if encoding.activations not in ("f32", "int8"):
        raise UsageError(f"activations {encoding.activations!r} are unknown here; choose f32 or int8")
    if quantized(encoding) and encoding.group != GROUP:
        raise UsageError(f"group {encoding.group} is not supported on the CPU; use group 32")
    if not quantized(encoding) and encoding.activations != "f32":
        raise UsageError(f"{encoding.format} weights take f32 activations; int8 ones go with int8 or int4 weights")


def quantized(encoding: Encoding) -> bool:
    """Whether weights are codes with scales."""
    return encoding.format in ("int8", "int4")


def padded(size: int, multiple: int = GROUP) -> int:
    """`size` rounded up."""
    return -(-size // multiple) * multiple


def wide(w: Weight) -> Tensor:
    """Any weight in f32. A weight in f32 is not copied."""
    if isinstance(w, Coded):
        return w.wide()
    if isinstance(w, Tensor):
        return w.float()
    return torch.from_numpy(np.require(w, np.float32, ["C", "W"]))


def groups(w: Tensor) -> Tensor:
    """[..., K] as [..., ceil(K/32), 32], filled up with zeros."""
    w = torch.nn.functional.pad(w, (0, -w.shape[-1] % GROUP))
    return w.reshape(*w.shape[:-1], -1, GROUP)


def quantize(w: Weight, encoding: Encoding) -> tuple[np.ndarray, np.ndarray | None]:
    """[..., K] -> (codes, scales): int8 [..., K padded to 32] and f16 [..., groups] for int8 and int4,
    uint16 [..., K] and None for bf16, f32 [..., K] and None for f32. Codes of the same encoding are taken as they are.
    """
    if isinstance(w, Coded) and w.encoding.format == encoding.format and (
            encoding.format == "fp8" or w.encoding.group == encoding.group):
        return w.codes.numpy(), w.scales.numpy()
    if encoding.format == "fp8":
        return fp8.quantize(wide(w))
    check(encoding)
    if encoding.format == "f32":
        return wide(w).numpy(), None
    if encoding.format == "bf16":
        return to_bf16(w), None
    blocks = groups(wide(w))
    scales = group_scales(blocks, encoding.format)
    wide_scales = scales.float()
    inverse = torch.where(wide_scales.abs() > TINY, 1 / wide_scales, 0)
    low, high = LIMITS[encoding.format]
    codes = (blocks * inverse[..., None]).round_().clamp_(low, high).to(torch.int8)
    return codes.reshape(*codes.shape[:-2], -1).numpy(), scales.numpy()


def quantize_int4(w: Weight) -> tuple[np.ndarray, np.ndarray]:
    """[..., N, K] -> (bytes, f16 scales) in groups of 128, see `int4`. int4 codes whose scales serve whole groups, as
    GPTQ and checkpoints make them, are taken as they are."""
    kept = int4.regroup(w.codes, w.scales) if isinstance(w, Coded) and w.encoding.format == "int4" else None
    return kept or int4.quantize(wide(w))


def group_scales(blocks: Tensor, format_: str) -> Tensor:
    """f16 scales [...] of f32 groups [..., 32]."""
    most, least = blocks.amax(-1), blocks.amin(-1)
    if format_ == "int8":
        scales = torch.maximum(most, -least) / 127
    else:
        scales = torch.where(most >= -least, most, least) / -8
    return scales.clamp_(-F16_MAX, F16_MAX).half()


def dequantize(codes: np.ndarray, scales: np.ndarray | None, encoding: Encoding, size: int) -> np.ndarray:
    """The f32 values [..., size] that codes stand for."""
    if encoding.format == "f32":
        return codes
    if encoding.format == "bf16":
        return from_bf16(codes)
    if scales is None:
        raise UsageError(f"{encoding.format} codes come with scales; none were given")
    if encoding.format == "fp8":
        return fp8.dequantize(codes, scales)
    blocks = codes.reshape(*codes.shape[:-1], -1, GROUP).astype(np.float32) * scales.astype(np.float32)[..., None]
    return blocks.reshape(*codes.shape)[..., :size]


def encode(w: Weight, encoding: Encoding) -> np.ndarray:
    """The weight as kernels see it: dequantize(quantize(w))."""
    if encoding.format == "int4-g128":
        return int4.dequantize(*quantize_int4(w), w.size if isinstance(w, Coded) else w.shape[-1])
    if encoding.format == "nvfp4":
        return fp4.dequantize(*fp4.quantize(wide(w)), w.size if isinstance(w, Coded) else w.shape[-1])
    codes, scales = quantize(w, encoding)
    return dequantize(codes, scales, encoding, w.size if isinstance(w, Coded) else w.shape[-1])


def quantize_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f32 [..., K] -> (int8 codes [..., K padded], f32 scales [..., groups]), scale = max|x| / 127 in a group of 32."""
    blocks = groups(wide(x)).numpy()
    most = np.abs(blocks).max(-1)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > TINY)
    codes = np.rint(blocks * inverse[..., None]).astype(np.int8)
    return codes.reshape(*codes.shape[:-2], -1), most / np.float32(127)


def encode_activations(x: np.ndarray) -> np.ndarray:
    """x after a round trip through int8: what a kernel with int8 activations multiplies."""
    codes, scales = quantize_activations(x)
    blocks = codes.reshape(*scales.shape, GROUP).astype(np.float32) * scales[..., None]
    return blocks.reshape(codes.shape)[..., :np.asarray(x).shape[-1]]


def to_bf16(w: Weight) -> np.ndarray:
    """Bit patterns of a weight rounded to bf16, nearest even. NaN stays NaN."""
    source = w if isinstance(w, Tensor) else wide(w)
    return source.bfloat16().contiguous().view(torch.int16).numpy().view(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """f32 of bf16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
