"""Choosing the next token from logits, in NumPy, row by row: a request's samples do not depend on its batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qcn_compile.errors import DeviceError
from qcn_compile.runtime.request import SamplingParams

NO_NUMBERS = ("the model's logits are not finite numbers: a kernel or the weights are damaged; "
              "check the build with qcn-run --verify")
_DEPTH = 64  # of the columns whose maxima bound the top k
_SHORTLIST = 2048  # tokens sorted first for top-p; the whole vocabulary only when these do not hold enough mass


@dataclass(frozen=True)
class Sample:
    """A chosen token; with logprobs asked for, its log probability and the most likely (token, logprob) pairs."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Constraint(Protocol):
    """A grammar over one request's output."""

    def allowed(self) -> np.ndarray:
        """Which tokens may come next, bool [vocab]; at least one."""
        ...

    def accept(self, token: int) -> None:
        """The token that was chosen."""
        ...


class Sampler:
    """One request's way of choosing: its parameters, its own random stream, and what it has seen.

    One random number is drawn per sampled token and none when greedy, so preemption and batching change nothing.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int,
                 constraint: Constraint | None = None) -> None:
        self.params = params
        self._constraint = constraint
        self._random = random.Random(params.seed)
        self._seen = np.zeros(vocab_size, bool) if params.penalised else None
        self._counts = np.zeros(vocab_size, np.float32) if params.penalised else None
        if self._seen is not None:
            self._seen[list(prompt)] = True
        inside = {token: bias for token, bias in params.logit_bias.items() if token < vocab_size}
        self._bias_tokens = np.array(list(inside), np.intp)
        self._bias = np.array(list(inside.values()), np.float32)

    def sample(self, logits: np.ndarray) -> Sample:
        """Choose from f32 [vocab], which is left as it is. Raises DeviceError for logits that are not numbers."""
        row = self._adjusted(logits)
        if not np.isfinite(row[best := int(row.argmax())]):
            raise DeviceError(NO_NUMBERS)
        token = best if self.params.greedy else self._draw(row)
        if self._constraint is not None:
            self._constraint.accept(token)
        if self._seen is not None and self._counts is not None:
            self._seen[token] = True
            self._counts[token] += 1
        if self.params.logprobs is None:
            return Sample(token)
        return _with_logprobs(token, logits, self.params.logprobs)

    def _adjusted(self, logits: np.ndarray) -> np.ndarray:
        """Bias, then penalties, then the grammar. A copy when anything changes."""
        params = self.params
        if len(self._bias_tokens) == 0 and self._seen is None and self._constraint is None:
            return logits
        row = logits.copy()
        row[self._bias_tokens] += self._bias
        if self._seen is not None and self._counts is not None:
            if params.repetition_penalty != 1.0:
                seen = row[self._seen]
                factor = np.where(seen > 0, 1.0 / params.repetition_penalty, params.repetition_penalty)
                row[self._seen] = seen * factor.astype(np.float32)
            row -= params.frequency_penalty * self._counts
            row -= params.presence_penalty * (self._counts > 0)
        if self._constraint is not None:
            row[~self._constraint.allowed()] = -np.inf
        return row

    def _draw(self, row: np.ndarray) -> int:
        ids, weights = distribution(row, self.params)
        reached = np.cumsum(weights)
        drawn = min(self._random.random() * reached[-1], np.nextafter(reached[-1], 0))  # never past the last weight > 0
        index = int(np.searchsorted(reached, drawn, side="right"))
        return int(index if ids is None else ids[index])


def distribution(row: np.ndarray, params: SamplingParams) -> tuple[np.ndarray | None, np.ndarray]:
    """Tokens that may follow (None: all) and their weights, not normalised: temperature, top-k, top-p, then min-p."""
    ids = None
    if 0 < params.top_k < len(row):
        ids = largest(row, params.top_k)
    kept = row if ids is None else row[ids]
    weights = np.exp((kept.astype(np.float64) - kept.max()) / params.temperature)
    if params.top_p < 1.0:
        chosen = _nucleus(weights, params.top_p)
        ids, weights = chosen if ids is None else ids[chosen], weights[chosen]
    if params.min_p > 0.0:
        chosen = np.flatnonzero(weights >= params.min_p * weights.max())
        ids, weights = chosen if ids is None else ids[chosen], weights[chosen]
    return ids, weights


def largest(row: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest of [N], no NaN among them, in no order.

    They are not smaller than the count-th largest maximum of N/64 columns, which few others reach."""
    columns, near = len(row) // _DEPTH, None
    if count < columns:
        tops = row[:columns * _DEPTH].reshape(_DEPTH, columns).max(0)
        near = np.flatnonzero(row >= np.partition(tops, columns - count)[columns - count])
    values = row if near is None else row[near]
    index = np.argpartition(values, len(values) - count)[len(values) - count:]
    return index if near is None else near[index]


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices of the fewest, heaviest weights that hold `top_p` of the mass; at least one."""
    wanted = top_p * weights.sum()
    for size in (_SHORTLIST, len(weights)):
        if size < len(weights):
            index = np.argpartition(weights, len(weights) - size)[len(weights) - size:]
        else:
            index = np.arange(len(weights))
        order = index[np.argsort(-weights[index], kind="stable")]
        reached = np.cumsum(weights[order])
        if reached[-1] >= wanted or size >= len(weights):
            break
    return order[: int(np.searchsorted(reached, wanted)) + 1]


def _with_logprobs(token: int, logits: np.ndarray, count: int) -> Sample:
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    top = np.argpartition(values, len(values) - count)[len(values) - count:] if 0 < count < len(values) else (
        np.arange(min(count, len(values))))
    top = top[np.argsort(-values[top], kind="stable")]
    return Sample(token, float(values[token]), tuple((int(i), float(values[i])) for i in top))
