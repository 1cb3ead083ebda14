"""Relative error of each format on a checkpoint's own weights: what an automatic choice is held against."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from qcn_compile.frontend.checkpoint import Checkpoint
from qcn_compile.frontend.tensor_files import Stored
from qcn_compile.ir.encoding import Encoding, encode

FORMATS = {"fp8": 128, "int8": 32, "int4": 32, "int4-g128": 128, "nvfp4": 16}  # that are packed, and their groups
MATRICES, ROWS = 24, 256  # of a checkpoint, and of each of these matrices


def weight_errors(folder: Path) -> dict[str, float]:
    """Format -> ||w - stored(w)|| / ||w||, the median over matrices from all of the model.

    Empty for a checkpoint that is quantised already: its weights are no measure of what another rounding costs.
    """
    checkpoint = Checkpoint(folder)
    if checkpoint.scheme:
        return {}
    matrices = [stored for _, stored in sorted(checkpoint.stored.items())
                if len(stored.shape) in (2, 3) and min(stored.shape[-2:]) >= 2 * FORMATS["int4"]]
    sample = [_rows(stored) for stored in matrices[::max(1, len(matrices) // MATRICES)]]
    return {name: median(_error(w, Encoding(name, group)) for w in sample) for name, group in FORMATS.items() if sample}


def _rows(stored: Stored) -> Tensor:
    """The first rows of a matrix, or of the first matrix of a stack, in f32."""
    rows = stored.read(0, 1)[0][:ROWS] if len(stored.shape) == 3 else stored.read(0, min(ROWS, stored.shape[0]))
    return rows.float()


def _error(w: Tensor, encoding: Encoding) -> float:
    norm = float(w.norm())
    return float((w - torch.from_numpy(encode(w.numpy(), encoding))).norm()) / norm if norm else 0.0
