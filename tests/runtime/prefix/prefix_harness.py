"""A runner whose caches are bytes: a rolling hash as the state, tokens as KV pages; logits depend on all of both."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from qcn_compile.runtime.batch import Capacity
from qcn_compile.runtime.engine import Engine, EngineConfig
from qcn_compile.runtime.prefix.cache import PrefixCache
from qcn_compile.runtime.prefix.policy import SnapshotPolicy
from qcn_compile.runtime.prefix.rows import CacheRows
from qcn_compile.runtime.speculation.chain import in_turn
from qcn_compile.runtime.speculation.mtp import MtpDrafter
from qcn_compile.runtime.speculation.ngram import LookupDrafter
from qcn_compile.runtime.speculation.speculation import Speculation

VOCAB, PAGE, CONTEXT, OPEN = 64, 4, 240, 63
PLANS = (Capacity(1, 1, 1), Capacity(8, 8, 8), Capacity(32, 6, 12))
MASK = (1 << 61) - 1


def roll(state, token):
    return (state * 1000003 + token + 1) & MASK


def row_of(state):
    return np.random.default_rng(state).normal(size=VOCAB).astype(np.float32)


class Hashing:
    """Asserts at every token that pages and state agree on the history; so a wrong page, slot or boundary is seen."""

    def __init__(self, pages, slots, capacities=PLANS):
        self.capacities = capacities
        self.kv = np.zeros((pages, PAGE), np.int32)
        self.states = np.zeros(slots, np.int64)
        self.rows = CacheRows([self.kv.view(np.uint8)], [self.states.reshape(-1, 1).view(np.uint8)])
        self.computed = self.steps = 0

    def run(self, spans):
        self.steps += 1
        wanted = sum(s.wanted for s in spans)
        assert any(c.holds(sum(len(s.tokens) for s in spans), len(spans), wanted) for c in self.capacities)
        rows, self.after = [], []
        for span in spans:
            state = int(self.states[span.slot]) if span.context else 0
            for place, token in enumerate(span.tokens, span.context):
                self.kv[span.pages[place // PAGE], place % PAGE] = token
                state = roll(state, token)
                self.after.append(state)
                self.computed += 1
                if place - span.context >= len(span.tokens) - span.wanted:
                    rows.append(row_of(state))
            stop = span.context + len(span.tokens)
            check = 0
            for token in self.kv[span.pages].reshape(-1)[:stop].tolist():
                check = roll(check, token)
            assert check == state, "pages and state tell different histories"
            self.states[span.target] = state
        return np.array(rows, np.float32).reshape(len(rows), VOCAB)


class HashingHead(Hashing):
    """With a draft head that continues the main model's state exactly, from what its own cache says it is.

    `breaks`: pairs in its cache that do not follow from the pair before them.
    """

    draft_capacities = PLANS

    def __init__(self, pages, slots, capacities=PLANS):
        super().__init__(pages, slots, capacities)
        self.pairs = np.zeros((pages, PAGE, 2), np.int64)
        self.rows = CacheRows([self.kv.view(np.uint8), self.pairs.reshape(pages, -1).view(np.uint8)],
                              [self.states.reshape(-1, 1).view(np.uint8)])
        self.breaks = self.drafts = 0

    def hidden(self):
        return np.array(self.after, np.int64).reshape(-1, 1)

    def draft(self, spans, hidden, rounds=1):
        return in_turn(self.once, spans, hidden, rounds)

    def once(self, spans, hidden):
        wanted = sum(s.wanted for s in spans)
        assert len(hidden) == sum(len(s.tokens) for s in spans)
        assert any(c.holds(len(hidden), len(spans), wanted) for c in self.draft_capacities)
        self.drafts += 1
        rows, after = [], []
        for span in spans:
            for place, token in enumerate(span.tokens, span.context):
                state = int(hidden[len(after), 0])
                self.pairs[span.pages[place // PAGE], place % PAGE] = state, token
                after.append(roll(state, token))
                if place - span.context >= len(span.tokens) - span.wanted:
                    rows.append(row_of(after[-1]))
            pairs = self.pairs[span.pages].reshape(-1, 2)[:span.context + len(span.tokens)].tolist()
            self.breaks += sum(roll(*old) != new[0] for old, new in pairwise(pairs))
        return np.array(rows).reshape(len(rows), VOCAB).argmax(-1), np.array(after, np.int64).reshape(-1, 1)


def policy(**fields):
    usual = {"page_size": PAGE, "openers": frozenset({OPEN}), "message_gap": 4, "chunk_gap": 8}
    return SnapshotPolicy(**{**usual, **fields})


def engine(pages=400, slots=8, snapshots=200, host=1 << 20, files=None, rules=None, eos=frozenset({0}), plans=PLANS,
           drafter=None, drafts=4, head=False, **fields):
    """An engine with a prefix cache; `snapshots` None: without one. Speculates with a drafter or a draft head."""
    runner = (HashingHead if head else Hashing)(pages, 2 * slots + (snapshots or 0), plans)
    guess = MtpDrafter(runner) if head else LookupDrafter(drafter)
    speculation = Speculation(slots, drafts, guess) if head or drafter else None
    config = EngineConfig(VOCAB, PAGE, CONTEXT, pages, slots, eos, **fields)
    made = None
    if snapshots is not None:
        def made(allocator):
            kept = range(2 * slots, 2 * slots + snapshots)
            return PrefixCache(allocator, runner.rows, rules or policy(), kept, host, files)
    built = Engine(runner, lambda token: bytes([97 + token % 26]), config, made, speculation)
    built.runner = runner
    return built


def finish(e, got=None, check=True):
    """Run to the end: {id: (tokens, reason, cached)}."""
    got = {} if got is None else got
    for _ in range(30000):
        if not e.unfinished:
            return got
        collect(e.step(), got)
        if check:
            e.check_integrity()
    raise AssertionError("the engine does not finish")


def collect(outputs, got):
    for output in outputs:
        tokens, _, cached = got.get(output.request_id, ([], None, 0))
        got[output.request_id] = (tokens + list(output.token_ids), output.finish_reason, cached + output.cached)


def answer(e, prompt, params):
    """One request alone: (tokens, cached)."""
    name = e.add_request(prompt, params)
    tokens, _, cached = finish(e)[name]
    return tokens, cached
