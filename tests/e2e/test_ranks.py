"""Builds for several ranks on the trained model: the text of one rank, every feature on, and clear ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from qcn_compile.artifact import read_manifest
from qcn_compile.compile import compile as build
from qcn_compile.errors import DeviceError, RankError
from qcn_compile.runtime.loaded import load
from qcn_compile.runtime.prefix.options import PrefixOptions
from qcn_compile.runtime.speculation.options import SpeculationOptions
from tests.e2e.conftest import HELDOUT
from tests.e2e.test_drafting import PROMPTS, tokens_of
from tests.runtime.server.test_process import body, running

COMMAND = [sys.executable, "-m", "qcn_compile.runtime.cli"]
DRAFTERS = [SpeculationOptions(3, "mtp"), SpeculationOptions(4)]


def test_equals_one_rank(builds, loaded):
    """Logits within rounding; greedy text identical, in batches, with prefix cache and the MTP head on."""
    equal(loaded("fp32"), builds("fp32-tp2"), DRAFTERS[0], 24)


def equal(one, folder, speculation, count):
    tokens = list(range(40, 140))
    reference = one.logits(tokens)
    want = tokens_of(one.generate(p, temperature=0, max_tokens=count) for p in PROMPTS)
    with load(folder, threads=2, max_running_requests=3, prefill_chunk=48, prefix=PrefixOptions(),
              speculation=speculation) as many:
        many.engine.speculation.times.ratio = lambda sequences: 1.0  # draft as long as anything is gained
        assert np.linalg.norm(many.logits(tokens) - reference) <= 1e-5 * np.linalg.norm(reference)
        for _ in range(2):  # the second time from cached prefixes
            streams = [many.generate(p, temperature=0, max_tokens=count) for p in PROMPTS]
            assert tokens_of(streams) == want
            many.check_integrity()
        assert many.engine.speculation.accepted > 20 and many.engine.prefixes.counts.hits > 0


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "ep"), [(2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 4)])
def test_every_layout_equals_one_rank(loaded, tmp_path, tp, ep):
    build(None, "cpu", tmp_path / "build", dtype="fp32", quant="none", tp=tp, ep=ep, mtp=True)
    for speculation in DRAFTERS:
        equal(loaded("fp32"), tmp_path / "build", speculation, 60)
    manifest = read_manifest(tmp_path / "build", deep=True)
    assert (manifest.layout["tp"], manifest.layout["ep"], len(manifest.ranks)) == (tp, ep, tp)


@pytest.mark.parametrize(("pp", "tp"), [(2, 2), *(pytest.param(*layout, marks=pytest.mark.slow)
                                                  for layout in [(2, 1), (3, 1), (8, 1)])])
def test_stages_equal_one_rank(loaded, tmp_path, pp, tp):
    """Stages of a pipeline, guesses by n-grams; one of 8 has no key-value head, as has every stage of one DeltaNet
    layer."""
    build(None, "cpu", tmp_path / "build", dtype="fp32", quant="none", pp=pp, tp=tp)
    equal(loaded("fp32"), tmp_path / "build", DRAFTERS[1], 60)
    manifest = read_manifest(tmp_path / "build", deep=True)
    assert (manifest.layout["pp"], len(manifest.ranks)) == (pp, pp * tp)
    whole = [cache.name for rank in range(0, pp * tp, tp) for cache in manifest.ranks[rank].caches]
    assert len(whole) == len(set(whole)) == manifest.model["config"]["num_hidden_layers"] + 6  # conv and delta of 6


@pytest.mark.parametrize(("pp", "tp"), [(2, 1), *(pytest.param(*layout, marks=pytest.mark.slow)
                                                  for layout in [(2, 2), (3, 1), (4, 2)])])
def test_a_draft_head_works_on_every_stage(loaded, tmp_path, pp, tp):
    """The last stage's hidden states reach all others, whose heads draft alike; each holds a head and its pages."""
    build(None, "cpu", tmp_path / "build", dtype="fp32", quant="none", pp=pp, tp=tp, mtp=True)
    equal(loaded("fp32"), tmp_path / "build", DRAFTERS[0], 40)
    parts = read_manifest(tmp_path / "build").ranks
    assert len(parts) == pp * tp and all(any("mtp" in cache.name for cache in part.caches) for part in parts)


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_weight_formats(loaded, tmp_path, quant):
    """Groups of 32 along a slice: formats round other groups than one rank does, so logits are close, not equal."""
    one = loaded("bf16" if quant == "none" else quant)
    tokens = list(range(40, 140))
    build(None, "cpu", tmp_path / "build", dtype="bf16", quant=quant, tp=2)
    with load(tmp_path / "build", threads=2) as two:
        error = np.linalg.norm(two.logits(tokens) - one.logits(tokens)) / np.linalg.norm(one.logits(tokens))
    assert error < {"none": 1e-5, "int8": 0.03, "int4": 0.03}[quant]


@pytest.mark.slow
def test_every_rank_calibrates_its_own_weights(loaded, tmp_path):
    """int4 by GPTQ is closer to fp32 on ranks, too: two of tensor parallelism, and two stages."""
    texts = [json.loads(line)["text"] for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[12:20]))
    ids = loaded("fp32").encode(texts[0])[:400]
    want, errors = loaded("fp32").logits(ids), {}
    for name, layout in (("rounded", {"tp": 2}), ("tp", {"tp": 2}), ("pp", {"pp": 2})):
        text = None if name == "rounded" else tmp_path / "text.jsonl"
        build(None, "cpu", tmp_path / name, dtype="bf16", quant="int4", activations="fp32", calibrate=text, **layout)
        with load(tmp_path / name, threads=2) as many:
            errors[name] = np.linalg.norm(many.logits(ids) - want) / np.linalg.norm(want)
    print(errors)
    assert max(errors["tp"], errors["pp"]) < 0.9 * errors["rounded"]


@pytest.mark.slow
def test_pages_and_states_survive_on_every_rank(builds, loaded, tmp_path):
    """Prefixes that left the caches for host memory and files come back on all ranks."""
    want = tokens_of([loaded("fp32").generate(p, temperature=0, max_tokens=30) for p in PROMPTS])
    options = PrefixOptions(states=3, host_bytes=50_000_000, store=tmp_path / "prefixes")
    for _ in range(2):  # the second process-like life reads the files of the first
        with load(builds("fp32-tp2"), threads=2, max_running_requests=1, prefix=options) as many:
            for _ in range(2):
                assert tokens_of([many.generate(p, temperature=0, max_tokens=30) for p in PROMPTS]) == want


def test_manifest_says_how_the_model_lies(builds):
    manifest = read_manifest(builds("fp32-tp2"), deep=True)
    assert (manifest.layout["tp"], manifest.layout["ep"], len(manifest.ranks)) == (2, 1, 2)
    assert manifest.of_rank(1).plans[0].startswith("plan/rank-1/")
    sizes = [sum(manifest.files[name]["bytes"] for name in part.weights["files"]) for part in manifest.ranks]
    whole = sum(row["bytes"] for name, row in read_manifest(builds("fp32")).files.items() if name.startswith("weights"))
    assert max(sizes) < 0.65 * whole  # with the draft head, which that build has not


def run(folder: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*COMMAND, str(folder), "--threads", "2", *flags], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})


def workers(process: subprocess.Popen[str], count: int = 1) -> list[int]:
    """Process ids of the other ranks, once they are there."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if len(children) == count:
            return [int(child) for child in children]
        time.sleep(0.05)
    raise AssertionError("no worker came")


def first_words(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None and process.stdout.read(1)


@pytest.mark.slow
def test_flags_must_agree_with_the_build(builds):
    done = run(builds("fp32-tp2"), "--prompt", "x", "--tp", "4")
    assert "--tp 4: " in done.communicate(timeout=60)[1]
    assert done.returncode == 2


def test_a_killed_rank_ends_the_run(builds):
    process = run(builds("fp32-tp2"), "--prompt", "def fib(n):", "--max-tokens", "20000")
    first_words(process)
    os.kill(workers(process)[0], signal.SIGKILL)
    _, words = process.communicate(timeout=30)
    assert process.returncode == 7
    assert "rank 1 (process" in words and "was killed by SIGKILL" in words and "Traceback" not in words


def test_a_model_is_closed_whole_without_a_rank(builds, monkeypatch):
    """Closing keeps prefixes, which asks every rank of a GPU build; the device is given back all the same."""
    model = load(builds("fp32-tp2"), max_running_requests=2, prefix=PrefixOptions())

    def copied(node, slot):
        raise RankError("rank 1 (process 1) was killed by SIGKILL")

    stream = model.generate(PROMPTS[0], temperature=0, max_tokens=50, ignore_eos=True)
    next(stream)
    monkeypatch.setattr(model.engine.prefixes.tiers, "keep_state", copied)
    with pytest.raises(RankError):
        model.close()
    assert not model._device._open


def test_a_stopped_rank_ends_the_run_at_the_deadline(builds):
    process = run(builds("fp32-tp2"), "--prompt", "def fib(n):", "--max-tokens", "20000", QCN_RANK_TIMEOUT="2")
    first_words(process)
    worker = workers(process)[0]
    os.kill(worker, signal.SIGSTOP)
    _, words = process.communicate(timeout=40)
    assert process.returncode == 7
    assert "rank 1 did not come to collective" in words and "within 2 s" in words
    assert not Path(f"/proc/{worker}").exists()


@pytest.mark.slow
def test_workers_end_with_rank_0(builds):
    process = run(builds("fp32-tp2"), "--prompt", "def fib(n):", "--max-tokens", "20000")
    first_words(process)
    worker = workers(process)[0]
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()


@pytest.mark.slow
def test_a_server_ends_when_a_rank_dies_idle(builds):
    with running(builds("fp32-tp2")) as (process, url):
        assert httpx.post(url + "/v1/chat/completions", json=body(), timeout=60).status_code == 200
        os.kill(workers(process)[0], signal.SIGKILL)
        assert process.wait(20) == 7


def test_a_server_tells_its_clients_and_ends(builds):
    with running(builds("fp32-tp2")) as (process, url), httpx.Client(timeout=60) as client:
        with client.stream("POST", url + "/v1/chat/completions", json=body(stream=True, max_tokens=20000)) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(workers(process)[0], signal.SIGKILL)
            assert "was killed by SIGKILL" in "".join(lines)
        assert process.wait(20) == 7


@pytest.mark.slow
def test_sigterm_drains_and_ends_all_ranks(builds):
    with running(builds("fp32-tp2")) as (process, _url):
        worker = workers(process)[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not Path(f"/proc/{worker}").exists()


def test_a_rank_that_cannot_start_says_why(builds, tmp_path):
    import shutil

    folder = Path(shutil.copytree(builds("fp32-tp2"), tmp_path / "build"))
    manifest = read_manifest(folder)
    weights = folder / manifest.of_rank(1).weights["files"][0]
    data = bytearray(weights.read_bytes())
    data[:8] = b"\xff" * 8
    weights.write_bytes(data)
    from qcn_compile.artifact import seal

    seal(folder, manifest)
    with pytest.raises((DeviceError, Exception), match="rank 1: "):
        load(folder, threads=2)
