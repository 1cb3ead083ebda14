"""What the kernels of targets/triton/kernels/sample.py read: a row of `choice` a pick, and arrays for each slot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcn_compile.runtime.choice import Pick
from qcn_compile.runtime.cuda.device import CudaDevice

LINE = 256
WIDTH = 16  # numbers of a row of `choice`
ON, PENALISED, BIASED, BOUND = 1, 2, 4, 8
PROMPT = 1 << 30  # of a history entry: the token is in the prompt; below it, how often it is in the output


def words(vocab: int) -> int:
    """Numbers of a grammar's mask."""
    return -(-vocab // 32)


def slot_arrays(vocab: int) -> dict[str, int]:
    """Array -> its numbers (4 bytes each) for one slot."""
    return {"last": 1, "history": vocab, "bias": vocab, "allowed": words(vocab)}


def array_bytes(vocab: int, slots: int, rows: int) -> dict[str, int]:
    """Array -> its bytes: those of slots, and the tokens chosen for the rows of a step."""
    sizes = {**{name: slots * size for name, size in slot_arrays(vocab).items()}, "chosen": rows}
    return {name: -(-4 * size // LINE) * LINE for name, size in sizes.items()}


def write_choice(rows: np.ndarray, picks: Sequence[Pick | None]) -> None:
    """Fill i32 [R, WIDTH]; a row of zeros leaves its logits to the host."""
    rows[:len(picks)] = 0
    for row, pick in zip(rows, picks, strict=False):
        if pick is None:
            continue
        params = pick.request.params
        seed = np.array([pick.seed], np.uint64).view(np.int32)
        row[:6] = flags(pick), pick.request.slot, min(params.top_k, 2**31 - 1), seed[0], seed[1], pick.index
        scale = 0.0 if params.greedy else 1.0 / params.temperature
        row[6:12].view(np.float32)[:] = (scale, params.top_p, params.min_p, params.repetition_penalty,
                                         params.frequency_penalty, params.presence_penalty)


def write_likeliest(rows: np.ndarray, slots: Sequence[int]) -> None:
    """Fill i32 [R, WIDTH]: the likeliest token of each row, as it is."""
    rows[:len(slots)] = 0
    rows[:len(slots), 0], rows[:len(slots), 1] = ON, slots
    rows[:len(slots), 6:12].view(np.float32)[:] = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0)


def flags(pick: Pick) -> int:
    """What the kernels look at for a pick."""
    params = pick.request.params
    return (ON | PENALISED * params.penalised | BIASED * bool(params.logit_bias)
            | BOUND * (pick.constraint is not None))


def history(pick: Pick, vocab: int) -> np.ndarray:
    """i32 [vocab]: what a request's prompt and output hold."""
    request = pick.request
    line = np.bincount(np.array(request.output, np.int64), minlength=vocab).astype(np.int32)
    line[np.array(request.prompt, np.int64)] |= PROMPT
    return line


def biases(pick: Pick, vocab: int) -> np.ndarray:
    """f32 [vocab]."""
    line = np.zeros(vocab, np.float32)
    for token, bias in pick.request.params.logit_bias.items():
        if token < vocab:
            line[token] = bias
    return line


def mask(pick: Pick, vocab: int) -> np.ndarray:
    """i32 [words]: a bit for each token that may come next."""
    assert pick.constraint is not None
    bits = np.zeros(32 * words(vocab), bool)
    bits[:vocab] = pick.constraint.allowed()
    return np.packbits(bits, bitorder="little").view(np.int32)


class SlotArrays:
    """Last token, history, biases and mask of each slot, and the tokens chosen, in device memory taken once."""

    def __init__(self, device: CudaDevice, slots: int, vocab: int, rows: int) -> None:
        self._device, self._vocab = device, vocab
        table = array_bytes(vocab, slots, rows)
        at, self.places = device.allocate(sum(table.values())), {}
        for name, nbytes in table.items():
            self.places[name] = at
            at += nbytes
        self._sizes = slot_arrays(vocab)
        self._line = device.pinned(4 * max(self._sizes.values())).view(np.int32)
        self._sent = device.event(timed=False)

    def send(self, picks: Sequence[Pick | None]) -> None:
        """What the picks need beyond their rows, in the stream."""
        for pick in picks:
            if pick is None:
                continue
            if pick.fresh and pick.request.params.penalised:
                self._send("history", pick, history(pick, self._vocab))
            if pick.fresh and pick.request.params.logit_bias:
                self._send("bias", pick, biases(pick, self._vocab).view(np.int32))
            if pick.constraint is not None:
                self._send("allowed", pick, mask(pick, self._vocab))

    def _send(self, name: str, pick: Pick, line: np.ndarray) -> None:
        assert pick.request.slot is not None
        self._device.wait(self._sent)  # the one before has left the pinned line
        self._line[:len(line)] = line
        self._device.upload_soon(self.places[name] + 4 * pick.request.slot * self._sizes[name], self._line[:len(line)])
        self._device.record(self._sent)
