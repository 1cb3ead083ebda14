"""Which replica a request goes to: prefix first, load before that when it is lopsided."""

from __future__ import annotations

import json

from qcn_compile.runtime.replicas.affinity import BLOCK, SLACK, Affinity, chain, prompt_of

LONG = "".join(f"line {i} of a file that an agent has read\n" for i in range(200))


def test_a_longer_prompt_follows_its_prefix() -> None:
    affinity = Affinity(3)
    first = affinity.choose(LONG, range(3))
    assert first is not None
    affinity.release(first)
    for text in (LONG + "and then?", LONG[:4000] + "another way", LONG + "x" * 999):
        assert affinity.choose(text, range(3)) == first
    other = affinity.choose("X" + LONG, range(3))  # nothing in common: the idlest
    assert other is not None and other != first


def test_the_idlest_gets_what_nobody_knows() -> None:
    affinity = Affinity(3)
    assert sorted(affinity.choose(str(i) * 500, range(3)) for i in range(3)) == [0, 1, 2]  # type: ignore[type-var]
    affinity.release(1)
    assert affinity.choose("new" * 300, range(3)) == 1


def test_a_busy_replica_is_not_buried() -> None:
    affinity = Affinity(2)
    got = [affinity.choose(LONG, range(2)) for _ in range(SLACK + 2)]
    assert got[:-1] == [got[0]] * (SLACK + 1) and got[-1] != got[0]


def test_the_dead_get_nothing_and_forget() -> None:
    affinity = Affinity(2)
    home = affinity.choose(LONG, range(2))
    assert home is not None
    affinity.release(home)
    assert affinity.choose(LONG, {1 - home}) == 1 - home
    assert affinity.choose(LONG, set()) is None
    affinity.forget(home)
    affinity.release(1 - home)
    assert affinity.choose(LONG, range(2)) == 1 - home


def test_prompts_and_blocks() -> None:
    one = {"messages": [{"role": "user", "content": LONG}], "model": "a"}
    two = {"model": "b", "temperature": 0, "messages": [*one["messages"], {"role": "user", "content": "more"}]}
    a, b = (chain(prompt_of(json.dumps(body).encode())) for body in (one, two))
    assert len(a) > 20 and b[:len(a) - 1] == a[:-1]
    assert prompt_of(b"no JSON") == prompt_of(b"[1]") == "" and chain("x" * (BLOCK - 1)) == []
