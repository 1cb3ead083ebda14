"""The store on disk: reuse after a restart, also a hard one; files that are damaged, cut or another build's."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from prefix_harness import answer, engine
from test_prefix_engine import GREEDY, message

from qcn_compile.runtime.prefix.files import MAGIC, PrefixFiles
from qcn_compile.runtime.request import SamplingParams

TURNS = 3


def serve(folder, build="b", limit=1 << 30, close=True, **fields):
    """An engine over a store after a conversation; the conversation's next prompt."""
    e = engine(files=PrefixFiles(folder, build, limit), **fields)
    rng = random.Random(0)
    history = message(rng, 30)
    for _ in range(TURNS):
        history += message(rng, 20)
        history += answer(e, history, GREEDY)[0]
    if close:
        e.prefixes.close()
    return history + message(rng, 9)


def restarted(folder, build="b", **fields):
    return engine(files=PrefixFiles(folder, build, 1 << 30), **fields)


@pytest.mark.parametrize("fields", [{}, {"snapshots": 2, "host": 0}, {"snapshots": 0, "host": 100_000}], ids=str)
def test_a_restart_resumes_from_files(tmp_path, fields):
    prompt = serve(tmp_path)
    want = answer(engine(snapshots=None), prompt, GREEDY)[0]
    e = restarted(tmp_path, **fields)
    assert answer(e, prompt, GREEDY) == (want, len(prompt) - 11)
    e.check_integrity()
    shorter = prompt[:75]  # off the stored boundaries: parts of a file
    assert answer(e, shorter, GREEDY)[0] == answer(engine(snapshots=None), shorter, GREEDY)[0]
    e.check_integrity()


def test_what_was_evicted_comes_back_from_files(tmp_path):
    e = engine(pages=64, snapshots=2, host=0, files=PrefixFiles(tmp_path, "b", 1 << 30))
    rng = random.Random(1)
    prompts = [message(rng, 80) for _ in range(6)]
    for prompt in prompts:
        answer(e, prompt, GREEDY)
    tokens, cached = answer(e, prompts[0] + [5, 6], GREEDY)
    assert cached >= 76 and tokens == answer(engine(snapshots=None), prompts[0] + [5, 6], GREEDY)[0]


def test_killed_while_writing(tmp_path):
    prompt = serve(tmp_path)
    half = tmp_path / f"half.partial-{os.getpid()}"
    half.write_bytes(b"half")
    assert answer(restarted(tmp_path), prompt, GREEDY)[1] == len(prompt) - 11
    assert not half.exists()


def damage(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("harm", "words"), [
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cut short"),
    (lambda path: path.write_bytes(b"someone's file"), "no prefix file"),
    (lambda path: path.write_bytes(MAGIC + b"{\n"), "no prefix file"),
    (lambda path: path.write_bytes(MAGIC + b'{"build": 3}\n'), "no prefix file"),
    (damage, "damaged"), (lambda path: path.write_bytes(b""), "no prefix file"),
])
def test_bad_files_are_ignored_with_one_line(tmp_path, capsys, harm, words):
    prompt = serve(tmp_path)
    for path in tmp_path.iterdir():
        harm(path)
    e = restarted(tmp_path)
    assert answer(e, prompt, GREEDY) == (answer(engine(snapshots=None), prompt, GREEDY)[0], 0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]
    e.check_integrity()


def test_one_damaged_file_costs_what_is_behind_it(tmp_path, capsys):
    prompt = serve(tmp_path)
    files = PrefixFiles(tmp_path, "b", 1 << 30)
    rows = sorted((stored.header.start, stored.path) for stored, _ in files.scan())
    damage(rows[-1][1])
    e = restarted(tmp_path)
    tokens, cached = answer(e, prompt, GREEDY)
    assert 0 < cached <= rows[-1][0] and tokens == answer(engine(snapshots=None), prompt, GREEDY)[0]


def test_another_builds_files_are_left_alone(tmp_path, capsys):
    prompt = serve(tmp_path)
    names = sorted(tmp_path.iterdir())
    assert answer(restarted(tmp_path, "other"), prompt, GREEDY)[1] == 0
    assert set(names) <= set(tmp_path.iterdir())
    assert capsys.readouterr().err == ""


def test_files_gone_while_running(tmp_path):
    prompt = serve(tmp_path)
    e = restarted(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    assert answer(e, prompt, GREEDY)[1] == 0
    e.check_integrity()


def test_the_folder_stays_within_its_limit(tmp_path):
    serve(tmp_path, limit=3000)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3000


def test_equal_prefixes_are_written_once(tmp_path):
    for _ in range(2):
        files = PrefixFiles(tmp_path, "b", 1 << 30)
        row = np.arange(10, dtype=np.int32), 4, np.zeros((4, 16), np.uint8), None
        assert files.add(*row).path == files.add(*row).path
        files.close()
    assert len(list(tmp_path.iterdir())) == 1


def test_contents_round_trip(tmp_path):
    files = PrefixFiles(tmp_path, "b", 1 << 30)
    pages, state = np.arange(64, dtype=np.uint8).reshape(4, 16), np.arange(5, dtype=np.uint8)
    stored = files.add(np.arange(10, dtype=np.int32), 4, pages, state)
    pending = files.read(stored)
    files.close()
    for contents in (pending, files.read(stored)):
        np.testing.assert_array_equal(contents.pages, pages)
        np.testing.assert_array_equal(contents.state, state)
        assert contents.tokens.tolist() == [4, 5, 6, 7, 8, 9]


def test_params_of_a_hit_may_differ(tmp_path):
    prompt = serve(tmp_path)
    sampled = SamplingParams(temperature=1, seed=3, max_tokens=9, ignore_eos=True)
    assert answer(restarted(tmp_path), prompt, sampled)[0] == answer(engine(snapshots=None), prompt, sampled)[0]


def test_lost_pages_under_a_state_on_the_device_do_not_hang(tmp_path):
    """A node whose pages are only in a file that is gone, whose state is in a slot, and which has children."""
    serve(tmp_path)
    e = restarted(tmp_path)
    inner = next(node for node in e.prefixes.tree if node.children and node.has_state)
    tiers = e.prefixes.tiers
    slot = tiers._slots.acquire() + tiers._first_slot
    assert tiers.load_state(inner, slot)
    inner.slot = slot
    prompt = [token for node in inner.path() for token in node.tokens.tolist()] + [5]
    inner.kv.file.path.unlink()
    tiers.unpin()
    assert answer(e, prompt, GREEDY)[0] == answer(engine(snapshots=None), prompt, GREEDY)[0]
    e.check_integrity()


def test_the_same_node_stored_twice_while_it_waits_is_one_file(tmp_path):
    files = PrefixFiles(tmp_path, "b", 1 << 30)
    files._thread = "not started: everything waits"
    first = files.add(np.arange(8, dtype=np.int32), 0, np.zeros((2, 16), np.uint8), None)
    again = files.add(np.arange(8, dtype=np.int32), 0, np.ones((2, 16), np.uint8), None)
    assert first is again and not files.read(again).pages.any()
