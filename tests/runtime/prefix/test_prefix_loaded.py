"""The prefix cache of a loaded build: flags, memory, the real rows, and a server that was killed."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from qcn_compile.errors import CapacityError, UsageError
from qcn_compile.runtime.cli import main, parser
from qcn_compile.runtime.loaded import load
from qcn_compile.runtime.prefix.options import PrefixOptions, prefix_options
from qcn_compile.runtime.prefix.policy import SnapshotPolicy

HISTORY = [{"role": "user", "content": "one two three"}]


def generate(model, prompt, **fields):
    """Greedy (tokens, cached)."""
    outputs = list(model.generate(prompt, temperature=0, max_tokens=12, ignore_eos=True, **fields))
    model.check_integrity()
    return [t for o in outputs for t in o.token_ids], outputs[-1].timing.cached_tokens


@pytest.fixture(autouse=True)
def dense(monkeypatch):
    """Keep states of short prompts, too."""
    monkeypatch.setattr(SnapshotPolicy.__init__, "__defaults__", (frozenset(), frozenset(), 4, 16))


@pytest.mark.parametrize("options", [PrefixOptions(), PrefixOptions(states=2), PrefixOptions(host_bytes=0, states=3),
                                     PrefixOptions(states=4, host_bytes=3000)], ids=str)
def test_turns_of_a_chat(toy_build, model, options):
    with load(toy_build, threads=1, context_length=128, prefix=options, max_running_requests=2) as cached:
        tokens = cached.encode(HISTORY)
        for turn in range(4):
            got, hit = generate(cached, tokens)
            assert got == generate(model, tokens)[0]
            assert hit > 0 or turn == 0 or cached.memory.snapshots + cached.memory.host_bytes == 0
            tokens = [*tokens, *got, *range(20 + turn, 26 + turn)]
        assert cached.engine.pages.used == 0


def test_memory_is_split_by_the_ratio_or_as_asked(toy_build):
    with load(toy_build, threads=1, cache_memory=20_000, prefix=PrefixOptions(host_bytes=7)) as model:
        memory = model.memory  # a page has 128 bytes, a state 64
        assert memory.slots + memory.snapshots == int(20_000 * 0.9 / 1.9) // 64
        assert memory.pages == (20_000 - memory.state_bytes) // 128
        assert memory.kv_bytes + memory.state_bytes <= 20_000 and memory.host_bytes == 7
        assert f"4 + {memory.snapshots} for cached prefixes state slots" in model.describe()
    with load(toy_build, threads=1, prefix=PrefixOptions(states=3)) as model:
        assert (model.memory.slots, model.memory.snapshots) == (3, 0)
    with load(toy_build, threads=1, prefix=PrefixOptions(states=9)) as model:
        assert (model.memory.slots, model.memory.snapshots) == (4, 5)
    with load(toy_build, threads=1, cache_memory=32 * 128 + 5 * 64, prefix=PrefixOptions()) as model:
        assert (model.memory.pages, model.memory.snapshots) == (32, 1)
    with pytest.raises(CapacityError, match="9 state slots"):
        load(toy_build, threads=1, cache_memory=32 * 128 + 5 * 64, prefix=PrefixOptions(states=9))


def test_flags(tmp_path):
    def options(*flags):
        return prefix_options(parser().parse_args(["build", "--chat", *flags]))

    assert options() == PrefixOptions()
    given = options("--prefix-cache-memory", "1.5", "--prefix-store", "d", "--max-mamba-cache-size", "9",
                    "--mamba-full-memory-ratio", "0.5")
    assert (given.host_bytes, str(given.store), given.states, given.ratio) == (1_500_000_000, "d", 9, 0.5)
    assert options("--disable-radix-cache") is None
    for flags, words in [(("--max-mamba-cache-size", "0"), "at least 1"), (("--prefix-cache-memory", "-1"), "least 0"),
                         (("--mamba-full-memory-ratio", "0"), "more than 0"),
                         (("--disable-radix-cache", "--prefix-store", "d"), "exclude")]:
        with pytest.raises(UsageError, match=words):
            options(*flags)


def test_a_store_that_cannot_be_used(toy_build, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(toy_build), "--prompt", "x", "--prefix-store", str(tmp_path / "file")]) == 2
    assert "--prefix-store" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from pathlib import Path
from qcn_compile.runtime.loaded import load
from qcn_compile.runtime.prefix.options import PrefixOptions
model = load(sys.argv[1], threads=1, prefix=PrefixOptions(store=Path(sys.argv[2])))
model.generate(list(range(40, 80)), temperature=0, max_tokens=12, ignore_eos=True).text()
while not any(name.endswith(".prefix") for name in os.listdir(sys.argv[2])):
    pass
model.generate([9] * 60, temperature=0, max_tokens=12, ignore_eos=True).text()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_a_usable_store(toy_build, model, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(toy_build), str(tmp_path)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    with load(toy_build, threads=1, prefix=PrefixOptions(store=tmp_path)) as again:
        first, _ = generate(model, list(range(40, 80)))
        prompt = [*range(40, 80), *first, 7, 8]
        assert generate(again, prompt) == (generate(model, prompt)[0], len(prompt) - 3)


def test_verbose_says_what_was_saved(toy_build, capsys):
    assert main([str(toy_build), "--prompt", "def f", "--max-tokens", "4", "--verbose", "--threads", "1"]) == 0
    assert "prefix cache: 0 of 1 requests hit" in capsys.readouterr().err
