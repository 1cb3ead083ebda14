"""Which replica gets a request: the one that has seen most of the prompt, unless it has much more to do; of equals the
one that has seen least."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

BLOCK = 256  # characters of a prompt that are known or not known together
KNOWN = 1 << 16  # blocks remembered of each replica
SLACK = 4  # requests that a replica with the prefix may have more than the idlest


class Affinity:
    """What each of `count` replicas has seen, and how many requests it has."""

    def __init__(self, count: int) -> None:
        self.busy = [0] * count
        self._seen: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(count)]

    def choose(self, text: str, alive: Iterable[int]) -> int | None:
        """A replica of those alive, None for none; it is taken to have seen the text, until `forget`. `release` it."""
        found = sorted(alive)
        if not found:
            return None
        blocks, idlest = chain(text), min(self.busy[i] for i in found)
        able = [i for i in found if self.busy[i] <= idlest + SLACK]
        best = max(able, key=lambda i: (self._known(i, blocks), -self.busy[i], -len(self._seen[i])))
        seen = self._seen[best]
        for block in blocks:
            seen[block] = None
            seen.move_to_end(block)
        while len(seen) > KNOWN:
            seen.popitem(last=False)
        self.busy[best] += 1
        return best

    def release(self, index: int) -> None:
        """A request is over."""
        self.busy[index] -= 1

    def forget(self, index: int) -> None:
        """A replica starts anew: its caches are gone."""
        self._seen[index].clear()

    def _known(self, index: int, blocks: list[bytes]) -> int:
        seen = self._seen[index]
        return next((n for n, block in enumerate(blocks) if block not in seen), len(blocks))


def chain(text: str) -> list[bytes]:
    """A digest for each whole block, of all text up to its end."""
    digests, state = [], blake2b(digest_size=12)
    for start in range(0, len(text) - BLOCK + 1, BLOCK):
        state.update(text[start:start + BLOCK].encode())
        digests.append(state.copy().digest())
    return digests


def prompt_of(body: bytes) -> str:
    """The part of a request that a prefix cache may know: tools, then system, then messages or prompt in order."""
    try:
        data: dict[str, Any] = json.loads(body)
        parts = [data[key] for key in ("tools", "system", "instructions", "messages", "prompt", "input") if key in data]
    except (ValueError, TypeError):
        return ""
    return "".join(part if isinstance(part, str) else json.dumps(part) for part in parts)
