"""Endless training windows from the carried token stream, documents shuffled anew each epoch."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from .config import END_OF_TEXT

LOOKAHEAD = 2  # the MTP head's target is two tokens ahead


def load_tokens(path: Path) -> np.ndarray:
    return np.frombuffer(lzma.decompress(path.read_bytes()), dtype="<u2")


def split_documents(ids: np.ndarray) -> list[np.ndarray]:
    """Documents with their closing <|endoftext|>."""
    ends = np.flatnonzero(ids == END_OF_TEXT) + 1
    return [ids[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def epoch_stream(documents: list[np.ndarray], rng: np.random.Generator, device: torch.device) -> torch.Tensor:
    order = rng.permutation(len(documents))
    stream = np.concatenate([documents[i] for i in order]).astype(np.int16)
    return torch.from_numpy(stream).to(device)


def batches(ids: np.ndarray, batch: int, length: int, device: torch.device, seed: int = 0) -> Iterator[torch.Tensor]:
    """Yield int64 [batch, length + LOOKAHEAD]; rows of one batch are far apart in the stream."""
    documents, rng = split_documents(ids), np.random.default_rng(seed)
    while True:
        stream = epoch_stream(documents, rng, device)
        windows = stream.unfold(0, length + LOOKAHEAD, length)
        order = torch.from_numpy(rng.permutation(len(windows))).to(device)
        for start in range(0, len(windows) - batch + 1, batch):
            yield windows[order[start : start + batch]].long()


def heldout_windows(ids: np.ndarray, length: int, device: torch.device) -> torch.Tensor:
    """All whole windows of the held-out stream, int64 [n, length + LOOKAHEAD]."""
    return torch.from_numpy(ids.astype(np.int64)).to(device).unfold(0, length + LOOKAHEAD, length)
