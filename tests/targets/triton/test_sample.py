"""The choice of tokens on the device: exact when greedy, distributed as the host's sampler otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness_gpu import BF16, DECODE_8, Case, Runner
from interpreter import Interpreter

from qcn_compile.ir.encoding import from_bf16, to_bf16
from qcn_compile.runtime.choice import Pick
from qcn_compile.runtime.cuda import sampling
from qcn_compile.runtime.request import Request, SamplingParams
from qcn_compile.runtime.sampler import Sampler, distribution
from qcn_compile.targets.base import Bucket, Kernel
from qcn_compile.targets.triton.target import GpuTarget

SLOTS = 4
TARGET = GpuTarget("h100")


class Board:
    """The launches of the op `sample` for one vocabulary, and memory for them."""

    def __init__(self, interpreter: Runner, vocab: int, rows: int, narrow: bool = True, slots: int = SLOTS) -> None:
        self.interpreter, self.vocab, self.rows, self.narrow = interpreter, vocab, rows, narrow
        case = Case("sample", Bucket("rows", rows, rows, rows))
        case.op("sample", [case.input("logits", f"{'bf16' if narrow else 'f32'}[R,{vocab}]")])
        self.calls = [call for _, call in case.lower(TARGET)]
        self.buffers = {name: np.zeros(slots * size, np.int32) for name, size in sampling.slot_arrays(vocab).items()}
        self.buffers["chosen"] = np.full(rows, -7, np.int32)
        for call in self.calls:
            for ref in call.args:
                if ref.kind == "scratch":
                    self.buffers[f"scratch {ref.name}"] = np.full(ref.bytes, 0xFF, np.uint8)

    def launches(self) -> list[tuple[Kernel, tuple[int, ...], list[str]]]:
        names = {"operand": lambda ref: "logits", "scratch": lambda ref: f"scratch {ref.name}"}
        return [(c.kernel, c.grid, [names.get(r.kind, lambda ref: ref.name)(r) for r in c.args]) for c in self.calls]

    def choose(self, logits: np.ndarray, picks: Sequence[Pick | None]) -> np.ndarray:
        """Tokens of f32 [R, vocab] logits."""
        choice = np.zeros((self.rows, sampling.WIDTH), np.int32)
        sampling.write_choice(choice, picks)
        for pick in picks:
            if pick is not None and pick.request.slot is not None:
                self._keep(pick)
        data = to_bf16(logits) if self.narrow else logits.astype(np.float32)
        counts = np.array([0, 0, len(picks), 0], np.int32)
        given = {**self.buffers, "logits": data, "choice": choice, "counts": counts}
        after = self.interpreter.run(self.launches(), {k: v.reshape(-1).view(np.uint8) for k, v in given.items()})
        self.buffers |= {name: after[name].view(np.int32) for name in sampling.slot_arrays(self.vocab)}
        return after["chosen"].view(np.int32)[:len(picks)]

    def _keep(self, pick: Pick) -> None:
        lines = {"history": sampling.history(pick, self.vocab)}
        lines["bias"] = sampling.biases(pick, self.vocab).view(np.int32)
        if pick.constraint is not None:
            lines["allowed"] = sampling.mask(pick, self.vocab)
        for name, line in lines.items():
            at = pick.request.slot * len(line)  # type: ignore[operator]
            self.buffers[name][at:at + len(line)] = line


def request(slot: int, prompt: Sequence[int] = (1, 2), output: Sequence[int] = (), **params: Any) -> Request:
    made = Request(f"r{slot}", list(prompt), SamplingParams(**params), 100, 0)
    made.tokens += output
    made.slot = slot
    return made


def picks_of(one: Request, count: int, seed: int = 11, constraint: Any = None) -> list[Pick]:
    return [Pick(one, i, seed, constraint) for i in range(count)]


def adjusted(logits: np.ndarray, one: Request, constraint: Any = None, narrow: bool = True) -> np.ndarray:
    """Row after the host's biases, penalties and grammar."""
    host = Sampler(one.params, one.prompt, len(logits), constraint)
    for token in one.output:
        if host._counts is not None and host._seen is not None:
            host._counts[token] += 1
            host._seen[token] = True
    return host._adjusted(from_bf16(to_bf16(logits)) if narrow else logits)


def expected(logits: np.ndarray, one: Request, constraint: Any = None) -> np.ndarray:
    """Probabilities [vocab] as the host's sampler has them."""
    row = adjusted(logits, one, constraint)
    ids, weights = distribution(row, one.params)
    whole = np.zeros(len(row))
    whole[np.arange(len(row)) if ids is None else ids] = weights / weights.sum()
    return whole


def surprise(tokens: np.ndarray, wanted: np.ndarray, row: np.ndarray | None = None) -> float:
    """Chi square over its degrees of freedom, rare tokens pooled; infinite for a token that cannot be. With `row`, the
    logits, those as large as the smallest kept one can be: a search over the whole vocabulary does not part equals."""
    count = np.bincount(tokens, minlength=len(wanted))
    never = wanted == 0 if row is None else row < row[wanted > 0].min()
    if count[never].any():
        return float("inf")
    common = wanted * len(tokens) >= 5
    got = np.append(count[common], count[~common].sum())
    want = np.append(wanted[common], wanted[~common].sum()) * len(tokens)
    got, want = got[want > 0], want[want > 0]
    return float(((got - want) ** 2 / want).sum() / max(len(want) - 1, 1))


EVEN = SimpleNamespace(allowed=lambda: np.arange(300) % 2 == 0)
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {  # how the kernel orders tokens to draw one, and what is asked for
    "plain": ("blocks", {}), "hot": ("blocks", {"temperature": 1.7}), "top-k": ("sorted", {"top_k": 7}),
    "top-p": ("sorted", {"top_p": 0.5}), "min-p": ("sorted", {"min_p": 0.2}), "one": ("sorted", {"top_k": 1}),
    "all": ("sorted", {"top_k": 20, "top_p": 0.8, "min_p": 0.02, "temperature": 0.8}),
    "wide top-k": ("number", {"top_k": 120}), "flat top-p": ("number", {"top_p": 0.97, "temperature": 3.0}),
    "wide": ("number", {"top_k": 150, "top_p": 0.97, "min_p": 1e-3}), "sharp": ("sorted", {"top_p": 1e-6}),
    "penalties": ("blocks", {"repetition_penalty": 1.6, "frequency_penalty": 0.5, "presence_penalty": 0.7}),
    "bias": ("sorted", {"logit_bias": {3: 12.0, 250: 11.0, 9: -100.0}, "top_p": 0.5})}


@pytest.fixture(scope="module")
def uniform(interpreter: Interpreter) -> np.ndarray:
    """The random numbers of seed 11 for the first tokens: a draw among 2^10 equal ones tells them."""
    vocab, rows = 1 << 10, 4
    board = Board(interpreter, vocab, rows)
    tokens = board.choose(np.zeros((rows, vocab), np.float32), picks_of(request(0), rows))
    numbers = np.arange(vocab)
    order = np.lexsort((numbers, numbers // 16 % board.calls[0].grid[0]))
    return np.asarray((np.argsort(order)[tokens] + 0.5) / vocab)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_draw_is_where_the_hosts_distribution_has_it(interpreter: Interpreter, uniform: np.ndarray,
                                                       name: str) -> None:
    vocab, rows, (order, params) = 700, 4, SETTINGS[name]
    logits = np.random.default_rng(5).permutation(np.linspace(-30, 6, vocab)).astype(np.float32)
    logits[[3, 17, 44]] += 2
    board = Board(interpreter, vocab, rows)
    each = [request(slot, (3, 5, 17), (17, 44, 17), **params) for slot in range(rows)]
    tokens = board.choose(np.tile(logits, (rows, 1)), [Pick(r, i, 11) for i, r in enumerate(each)])
    one = each[0]
    wanted, row, blocks = expected(logits, one), adjusted(logits, one), board.calls[0].grid[0]
    numbers = np.arange(vocab)
    way = {"number": numbers, "sorted": np.lexsort((numbers, -row)),
           "blocks": np.lexsort((numbers, numbers // 16 % blocks))}[order]
    ends = np.zeros(vocab)
    ends[way] = np.cumsum(wanted[way])
    assert (wanted[tokens] > 0).all()
    slack = 1e-3  # of the random numbers as they are known here
    assert (ends[tokens] - wanted[tokens] - slack <= uniform[:rows]).all()
    assert (uniform[:rows] <= ends[tokens] + slack).all()


def test_the_frequencies_are_the_hosts(interpreter: Interpreter) -> None:
    logits = np.random.default_rng(5).normal(size=40).astype(np.float32) * 2
    one, board = request(2, temperature=0.8), Board(interpreter, 40, 64)
    tokens = np.concatenate([board.choose(np.tile(logits, (64, 1)), picks_of(one, 64, seed)) for seed in range(2)])
    assert surprise(tokens, expected(logits, one)) < 2.0


def test_a_grammar_bounds_the_choice(interpreter: Interpreter) -> None:
    logits = np.random.default_rng(5).normal(size=300).astype(np.float32)
    one, board = request(1, top_k=30), Board(interpreter, 300, 8)
    tokens = board.choose(np.tile(logits, (8, 1)), picks_of(one, 8, constraint=EVEN))
    assert (expected(logits, one, EVEN)[tokens] > 0).all() and not (tokens % 2).any() and len(set(tokens)) > 2


@pytest.mark.parametrize("vocab", [5, 300, 2050])
def test_greedy_is_exact_in_any_batch(interpreter: Interpreter, vocab: int) -> None:
    rng, board = np.random.default_rng(vocab), Board(interpreter, vocab, 6, narrow=vocab != 300)
    logits = rng.normal(size=(6, vocab)).astype(np.float32)
    logits[1, [vocab - 1, vocab - 3, 2]] = logits[1].max() + 1  # equal ones: the first
    logits[4] = np.nan
    asked = [request(0, temperature=0.0), request(1, temperature=0.0, logit_bias={1: 50.0}), None,
             request(2, (1,), (2, 2), temperature=0.0, frequency_penalty=2.0), request(3, temperature=0.0)]
    picks = [None if r is None else picks_of(r, 1)[0] for r in asked]
    got = board.choose(logits, picks)
    for row, r in zip((0, 1, 3), (asked[0], asked[1], asked[3]), strict=True):
        assert r is not None and got[row] == adjusted(logits[row], r, narrow=board.narrow).argmax()
    assert got[2] == -7 and got[4] == -1  # left to the host; no numbers
    assert board.buffers["last"].tolist() == [got[0], got[1], got[3], 0]
    assert board.buffers["history"].reshape(SLOTS, vocab)[2, got[3]] == sampling.history(picks[3], vocab)[got[3]] + 1


def test_a_draw_belongs_to_seed_and_index(interpreter: Interpreter) -> None:
    logits = np.random.default_rng(2).normal(size=(8, 300)).astype(np.float32)
    board = Board(interpreter, 300, 8)
    picks = [Pick(request(i % 4, top_k=50), i, 2**63 + i) for i in range(8)]
    whole = board.choose(logits, picks)
    order = [5, 0, 7]
    assert board.choose(logits[order], [picks[i] for i in order]).tolist() == whole[order].tolist()
    other = board.choose(logits, [Pick(p.request, p.index, p.seed + 1) for p in picks])
    assert (other != whole).sum() > 4


def test_kernels_write_what_the_next_step_reads(interpreter: Interpreter) -> None:
    """Token -1 - s is the one last chosen for slot s."""
    case = Case("embedding", DECODE_8)
    case.op("embedding", [case.input("ids", "i32[T]"), case.weight("table", (30, 16), BF16)])
    ((_, call),) = case.lower(TARGET)
    weights = to_bf16(np.random.default_rng(0).normal(size=(30, 16)))
    buffers = {"ids": np.array([4, -1, -3, 7], np.int32), "last": np.array([9, 0, 21], np.int32), "w": weights,
               "y": np.zeros((8, 16), np.uint16), "counts": np.array([4, 4, 4, 0], np.int32)}
    after = interpreter.run([(call.kernel, call.grid, list(buffers))],
                            {k: v.reshape(-1).view(np.uint8) for k, v in buffers.items()})
    assert np.array_equal(after["y"].view(np.uint16).reshape(8, 16)[:4], weights[[4, 9, 21, 7]])
