"""Replays the shapes of agent sessions through the engine and counts what is computed twice.

`python tests/runtime/prefix/agent_replay.py TRACE` counts for a whole trace: rows of session_id, input_length
(new tokens of a turn), output_length, hash_ids of the first turn's blocks. The runner computes nothing.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from qcn_compile.runtime.batch import Capacity
from qcn_compile.runtime.engine import Engine, EngineConfig
from qcn_compile.runtime.prefix.cache import PrefixCache
from qcn_compile.runtime.prefix.policy import SnapshotPolicy
from qcn_compile.runtime.prefix.rows import CacheRows
from qcn_compile.runtime.request import SamplingParams

VOCAB, PAGE, CONTEXT, BLOCK = 4096, 32, 262144, 512
OPEN, CLOSE, ROLE = 4000, 4001, 4002
STATE, PAGE_BYTES = 24, 1  # a state weighs as much as 768 tokens of KV


class Idle:
    """Random-looking logits, nothing computed; counts tokens."""

    def __init__(self, pages, slots, chunk):
        self.capacities = (Capacity(8, 8, 8), Capacity(chunk, 8, 8))
        self.rows = CacheRows([np.zeros((pages, PAGE_BYTES), np.uint8)], [np.zeros((slots, STATE), np.uint8)])
        self.computed = self.steps = 0
        self._logits = np.zeros((8, VOCAB), np.float32)

    def run(self, spans):
        self.steps += 1
        self.computed += sum(len(span.tokens) for span in spans)
        self._logits[:] = 0
        for row, span in enumerate(s for s in spans if s.wanted):
            self._logits[row, (span.context * 7919 + span.slot * 31) % 3900] = 1
        return self._logits[:sum(span.wanted for span in spans)]


class Known:
    """Longest prefix of a prompt that any earlier request held, by blocks of tokens."""

    def __init__(self):
        self._seen = set()

    def new(self, tokens):
        known, key = 0, 0
        for start in range(0, len(tokens), PAGE):
            key = hash((key, tuple(tokens[start:start + PAGE])))
            if key not in self._seen:
                return len(tokens) - known
            known = start + PAGE
        return 0

    def add(self, tokens):
        key = 0
        for start in range(0, len(tokens), PAGE):
            key = hash((key, tuple(tokens[start:start + PAGE])))
            self._seen.add(key)


def first_prompt(row):
    """Blocks with equal ids have equal tokens, in messages of some blocks each."""
    tokens = []
    for place, block in enumerate(row["hash_ids"]):
        rng = np.random.default_rng(block)
        tokens += [OPEN] * (place % 60 == 0) + rng.integers(0, 3900, BLOCK - (place % 60 == 0)).tolist()
    return tokens[:row["input_length"]] + [CLOSE]


def replay(rows, cache=True, pages=400_000, snapshots=4096, host=1 << 30, width=4, chunk=2048, strip=False):
    """Sessions `width` at a time: (computed, new, all prompts' tokens, engine). `strip`: old answers are rewritten."""
    runner = Idle(pages, width + snapshots, chunk)
    policy = SnapshotPolicy(PAGE, frozenset({OPEN}))
    made = (lambda p: PrefixCache(p, runner.rows, policy, range(width, width + snapshots), host)) if cache else None
    engine = Engine(runner, lambda token: b"x", EngineConfig(VOCAB, PAGE, CONTEXT, pages, width), made)
    sessions = defaultdict(list)
    for row in rows:
        sessions[row["session_id"]].append(row)
    waiting, live, known = list(sessions.values()), {}, Known()
    histories, outputs, new, total = {}, {}, 0, 0

    def start(session):
        nonlocal new, total
        row = session[0]
        fresh = row["hash_ids"] and "timestamp" in row
        rng = np.random.default_rng(len(session) + row["input_length"])
        tokens = first_prompt(row) if fresh else (
            histories[id(session)] + [CLOSE, OPEN] + rng.integers(0, 3900, row["input_length"]).tolist() + [CLOSE])
        tokens = tokens[:CONTEXT - row["output_length"] - 8] + [OPEN, ROLE]
        new += known.new(tokens)
        total += len(tokens)
        histories[id(session)] = tokens
        params = SamplingParams(temperature=0, max_tokens=row["output_length"], ignore_eos=True)
        name = engine.add_request(tokens, params)
        live[name], outputs[name] = session, []

    while waiting or live:
        while waiting and len(live) < width:
            start(waiting.pop(0))
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                session = live.pop(output.request_id)
                answer = outputs.pop(output.request_id)
                new += len(answer) - 1
                history = histories[id(session)]
                known.add(history + answer)
                histories[id(session)] = history + (answer[len(answer) // 2:] if strip else answer)
                session.pop(0)
                if session:
                    start(session)
    engine.check_integrity()
    return runner.computed, new, total, engine


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


if __name__ == "__main__":
    trace = read(sys.argv[1])
    for title, setting in {"without cache": {"cache": False}, "all fits": {}, "old answers rewritten": {"strip": True},
                           "1 M tokens of pages, spilled": {"pages": 32_768, "snapshots": 400},
                           "1 M tokens of pages, no host": {"pages": 32_768, "snapshots": 400, "host": 0}}.items():
        computed, new, total, made = replay(trace, **setting)
        print(f"{title:32} computed {computed:9} new {new:9} ratio {computed / new:6.3f}  of {total} prompt tokens; "
              f"{made.prefixes}", flush=True)
