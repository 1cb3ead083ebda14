"""Sums over peer memory: the kernel in the interpreter, and the runtime's choice between it and NCCL."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_ranks
import numpy as np
import pytest
from exchange_scenario import lowered

from qcn_compile.artifact import (
    ALIGNMENT,
    PEER_ROWS,
    SCHEMA,
    Arg,
    CacheSpec,
    Collective,
    Launch,
    Manifest,
    Plan,
    RankPart,
    check_ranks,
    read_manifest,
    read_plan,
    seal,
    write_json,
)
from qcn_compile.compile import compile as compile_model
from qcn_compile.errors import ArtifactError, DeviceError, UsageError
from qcn_compile.frontend.checkpoint import locate
from qcn_compile.runtime.batch import Span
from qcn_compile.runtime.choice import Pick
from qcn_compile.runtime.late_checkpoint import Checkpoint
from qcn_compile.runtime.late_weights import pieces
from qcn_compile.runtime.ranks import cuda
from qcn_compile.runtime.ranks.team import CALL
from qcn_compile.runtime.request import Request, SamplingParams
from qcn_compile.targets.base import Kernel
from qcn_compile.targets.spec import hardware
from qcn_compile.targets.triton.emit import emit
from qcn_compile.targets.triton.families import FAMILIES
from qcn_compile.targets.triton.target import GpuTarget


def test_ranks_get_the_sum_in_order(tmp_path: Path) -> None:
    script = Path(__file__).with_name("exchange_scenario.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.stdout == "equal\n", done.stderr[-2000:]


WIDTH = 5
SPAN = Span([7], 3, 1, np.array([5], np.int32), 1)


def build(folder: Path) -> Path:
    """A plan of two ranks: a sum with a kernel, one without, and a gather."""
    (folder / "kernels").mkdir(parents=True)
    row = {"file": "k.cubin", "entry": "k", "shared": 0, "threads": 32, "pdl": True, "pointers": 4, "loose": []}
    write_json(folder / "kernels" / "kernels.json", {"sum": row})
    (folder / "kernels" / "k.cubin").write_bytes(b"cubin")
    args = (Arg("workspace", offset=0), Arg("workspace", offset=256), Arg("input", "peers"), Arg("input", "counts"))
    small, large = (Collective("all_reduce", "bf16", "T", width) for width in (8, 8000))
    gather = Collective("all_gather", "bf16", "R", 3)
    launches = (Launch("sum", args, "all_reduce %a", "here", grid=(2,), collective=small),
                Launch("all_reduce", args, "all_reduce %b", "here", collective=large),
                Launch("all_gather", args, "all_gather %c", "here", collective=gather),
                *(Launch("sum", args, f"after {who}", "here", grid=(1,)) for who in ("NCCL", "ours")))
    plan = Plan("main", "decode-2", 2, 2, 2, 4096, launches,
                {"logits": {"offset": 512, "dtype": "bf16", "width": WIDTH}})
    for rank in range(2):
        write_json(folder / f"plan/rank-{rank}/main.json", plan.to_json())
    caches = (CacheSpec("delta", "delta", "f32", (2, 4), 32), CacheSpec("kv", "kv", "bf16", (1, 4, 8), 2 * 2 * 32))
    parts = tuple(RankPart(caches, (f"plan/rank-{rank}/main.json",), {"mode": "dummy", "files": [], "blobs": {}})
                  for rank in range(2))
    target = {"name": "h100", "kind": "gpu", "arch": 90}
    seal(folder, Manifest(SCHEMA, {}, target, {}, caches, 4, 32, WIDTH, 8, parts[0].plans, ("kernels/kernels.json",),
                          parts[0].weights, {}, layout={"tp": 2}, ranks=parts))
    return folder


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Rank 0 here and rank 1 as a process, both without a GPU: what they would do, in which order."""
    fakes = fake_ranks.install(monkeypatch.setattr)
    monkeypatch.setattr(cuda, "__name__", "fake_ranks")
    left: list[Any] = []
    monkeypatch.setattr("atexit.register", left.append)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("FAKE_RANKS", str(tmp_path / "rank-1.json"))
    folder = build(tmp_path / "build")
    device, executable, _ = cuda.open_ranks_cuda(folder, read_manifest(folder), 16, 2, None)
    yield executable, *fakes, tmp_path / "rank-1.json"
    try:
        device.watch(0.0)
        lost = False
    except DeviceError:
        lost = True
    executable.team.close()
    device.close()
    assert bool(left) is lost  # then nothing of the process may wait for the GPU


def staged(folder: Path) -> Path:
    """The same build as two stages: what one sends the other takes, and the logits come back."""
    build(folder)
    manifest = read_manifest(folder)
    for rank, kinds in enumerate((("send", "recv"), ("recv", "send"))):
        name = folder / f"plan/rank-{rank}/main.json"
        plan = Plan.from_json(json.loads(name.read_text()))
        ways = tuple(replace(plan.launches[1], kernel=kind, op=f"{kind} %x", collective=Collective(
            kind, "bf16", rows, width, 1 - rank)) for kind, rows, width in zip(kinds, "TR", (8, WIDTH), strict=True))
        write_json(name, replace(plan, launches=(ways[0], *plan.launches[3:], ways[1])).to_json())
    seal(folder, replace(manifest, layout={"pp": 2}))
    return folder


def test_stages_send_and_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways are connected before anything is captured; then each plan is captured with its transfers."""
    _, library = fake_ranks.install(monkeypatch.setattr)
    monkeypatch.setattr(cuda, "__name__", "fake_ranks")
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("FAKE_RANKS", str(tmp_path / "rank-1.json"))
    folder = staged(tmp_path / "build")
    device, executable, _ = cuda.open_ranks_cuda(folder, read_manifest(folder), 16, 2, None)
    try:
        executable.run([SPAN])
        executable.rows.read_state(1)  # when this is answered, the other has run its step
        ways = [[name, count] for name, count in library.calls if name in ("ncclSend", "ncclRecv")]
        assert ways == [["ncclSend", 4], ["ncclRecv", 4], ["ncclSend", 16], ["ncclRecv", 2 * WIDTH]]
        assert [name for name, _ in library.calls].count("ncclCommInitRank") == 2  # of its stage, of all
        log = json.loads((tmp_path / "rank-1.json").read_text())
        theirs = [call for call in log["calls"] if call[0] in ("ncclSend", "ncclRecv")]
        assert theirs == [[{"ncclSend": "ncclRecv", "ncclRecv": "ncclSend"}[name], count] for name, count in ways]
        assert log["same"] and log["replays"] == 1
    finally:
        executable.team.close()
        device.close()


def test_a_send_that_nobody_takes_is_found(tmp_path: Path) -> None:
    folder = staged(tmp_path / "build")
    manifest = read_manifest(folder)
    name = folder / "plan/rank-1/main.json"
    plan = Plan.from_json(json.loads(name.read_text()))
    write_json(name, replace(plan, launches=plan.launches[1:]).to_json())
    with pytest.raises(ArtifactError, match=r"has 2 collectives that differ from the 1 of plan/rank-1/main\.json"):
        check_ranks(folder, manifest.ranks, manifest.layout)


def test_every_rank_captures_and_runs_the_same(opened: Any) -> None:
    executable, driver, library, log = opened
    configs = [config for config, _ in driver.launches]  # the small sum is a kernel; NCCL does the others, on as many
    assert [(c.gridDimX, c.numAttrs) for c in configs] == [(2, 1), (1, 0), (1, 1)]  # rows as the plan holds
    assert library.calls[-2:] == [("ncclAllReduce", 16000), ("ncclAllGather", 6)]
    executable.run([SPAN])
    request = Request("r", [1, 2], SamplingParams(presence_penalty=0.5), 9, 0)
    request.slot = 1
    executable.launch([SPAN], [Pick(request, 0, 7, None, fresh=True)]).tokens()
    executable.rows.copy_state(0, 1)
    assert executable.rows.read_state(1).nbytes == 2 * 32 == executable.rows.state_bytes  # both ranks' parts
    calls = [list(call) for call in library.calls[1:]]
    assert json.loads(log.read_text()) == {"plan": "main-decode-2", "same": True, "calls": calls, "replays": 2}


def test_a_rank_that_ends_is_an_error_not_a_wait(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    executable, driver, _, _ = opened
    driver._cuEventQuery = lambda event: (600,)  # its step never ends
    os.kill(executable.team.processes[0], signal.SIGKILL)
    with pytest.raises(DeviceError, match=r"rank 1 \(process \d+\) was killed by SIGKILL"):
        executable.run([SPAN])
    with pytest.raises(DeviceError, match="SIGKILL"):  # what keeping a prefix does when the run is closed
        executable.rows.copy_state(0, 1)
    driver._cuEventQuery = lambda event: (0,)


def test_a_rank_that_does_not_come_is_given_up(opened: Any) -> None:
    executable, driver, _, _ = opened
    driver._cuEventQuery = lambda event: (600,)
    executable._device.watch = cuda._watch(0.2, executable.team)
    with pytest.raises(DeviceError, match=r"did not end within 0.2 s: a rank does not come"):
        executable.run([SPAN])
    driver._cuEventQuery = lambda event: (0,)


def test_rank_0_may_come_last(opened: Any) -> None:
    team = opened[0].team
    team._loaded.clear()

    def work() -> int:
        team.tell("sizes")
        team._send(CALL + pickle.dumps(("sizes", ())))  # what the other rank says while this one still loads
        time.sleep(1)
        return 3

    assert team.during(work) == 3
    team.ready()  # at once: it has been said


def test_too_few_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, _ = fake_ranks.install(monkeypatch.setattr)
    driver.count = 1
    folder = build(tmp_path / "build")
    with pytest.raises(DeviceError, match="is for 2 GPUs, this machine shows 1"):
        cuda.open_ranks_cuda(folder, read_manifest(folder), 16, 2, None)


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> list[Kernel]:
    """The kernels that builds ask for, which are not compiled."""
    kernels: list[Kernel] = []

    def emit(self: GpuTarget, given: list[Kernel], folder: Path, progress: object = None) -> list[str]:
        kernels.extend(given)
        folder.mkdir()
        (folder / "kernels.json").write_text("{}")
        return ["kernels.json"]

    monkeypatch.setattr(GpuTarget, "emit", emit)
    return kernels


def test_every_stage_of_a_build_has_its_layers(tmp_path: Path, emitted: list[Kernel]) -> None:
    """2 stages of 2 ranks: collectives fit, weights that are not an edge's are in one stage, tokens chosen on all."""
    manifest = compile_model(locate(None, "cpu").path, "h100", tmp_path / "build", quant="fp8", weights="late", tp=2,
                             pp=2).manifest
    assert all(kernel.family in FAMILIES and kernel.params for kernel in emitted)
    check_ranks(tmp_path / "build", manifest.ranks, manifest.layout)
    plans = [read_plan(tmp_path / "build", part.plans[0]) for part in manifest.ranks]
    met = [[launch.collective.kind for launch in plan.launches if launch.collective] for plan in plans]
    half = int(manifest.model["config"]["num_hidden_layers"])  # two sums a layer
    assert met[0] == met[1] == ["all_reduce"] * (half + 1) + ["send", "recv"]
    assert met[2] == met[3] == ["recv"] + ["all_reduce"] * half + ["all_gather", "send"]
    assert all(any(launch.op.startswith("sample") for launch in plan.launches) for plan in plans)
    names = [set(part.weights["recipes"]) for part in manifest.ranks]
    sizes = [sum(sum(row["parts"].values()) for row in part.weights["recipes"].values()) for part in manifest.ranks]
    assert len(names) == 4 and max(sizes) < 0.36 * int(manifest.decisions["weight_bytes"])


def test_sums_go_into_norms(tmp_path: Path, emitted: list[Kernel]) -> None:
    """Plans of few tokens have a twin with as many collectives, whose sums bring the norm along."""
    manifest = compile_model(locate(None, "cpu").path, "h100", tmp_path / "build", quant="fp8", weights="late",
                             tp=2).manifest
    plain, fused = (manifest.of_rank(1, choice).plans for choice in (False, True))
    assert len(plain) == len(fused) and not any("fused" in name for name in plain)
    layers, delta = int(manifest.model["config"]["num_hidden_layers"]), sum(c.kind == "delta" for c in manifest.caches)
    assert sorted(plain) == sorted(name.replace("-fused", "") for name in fused)
    for name in fused:
        plan = read_plan(tmp_path / "build", name)
        kinds = [launch.collective.kind for launch in plan.launches if launch.collective]
        if "fused" not in name:
            assert plan.tokens > PEER_ROWS and "all_reduce_norm" not in kinds
            continue
        twin = read_plan(tmp_path / "build", name.replace("-fused", ""))
        norms = kinds.count("all_reduce_norm")
        pairs = delta if plan.tokens == 1 else 0  # the norms that go with two products stay with these
        assert norms == 2 * layers + 1 - pairs and len(kinds) == 2 * layers + 2
        assert len(plan.launches) == len(twin.launches) - (1 if pairs else norms)  # one token: norms had no launches
    families = {kernel.family for kernel in emitted}
    assert {"all_reduce", "all_reduce_norm"} <= families


@pytest.mark.parametrize("card", ["h100", pytest.param("a100", marks=pytest.mark.slow),
                                  pytest.param("b200", marks=pytest.mark.slow)])
def test_sums_with_norms_compile_at_full_size(card: str, tmp_path: Path) -> None:
    kernels = [call.kernel for name, codes in (("all_reduce", False), ("all_reduce_norm", False),
                                               ("all_reduce_norm", card != "a100"))
               for call in lowered(name, 8, 2048, 8, fused=True, codes=codes)]
    names = emit(list(dict.fromkeys(kernels)), tmp_path, hardware(card), workers=1)
    rows = json.loads((tmp_path / names[0]).read_text()).values()
    assert all(row["stack"] == 0 for row in rows)


def test_fused_plans_are_taken_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ranks.install(monkeypatch.setattr)
    monkeypatch.setattr(cuda, "__name__", "fake_ranks")
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("FAKE_RANKS", str(tmp_path / "rank-1.json"))
    folder = build(tmp_path / "build")
    manifest, parts = read_manifest(folder), []
    for rank, part in enumerate(manifest.ranks):
        plan = read_plan(folder, part.plans[0])
        twin = f"plan/rank-{rank}/main-fused.json"
        write_json(folder / twin, replace(plan, name=f"{plan.name}-fused").to_json())
        parts.append(replace(part, plans=(*part.plans, twin)))
    seal(folder, replace(manifest, ranks=tuple(parts)))
    for word, name in (("", "decode-2"), ("fused", "decode-2-fused")):
        monkeypatch.setenv("QCN_ALL_REDUCE", word)
        device, executable, _ = cuda.open_ranks_cuda(folder, read_manifest(folder), 16, 2, None)
        try:
            executable.run([SPAN])
            executable.rows.read_state(1)
            assert json.loads((tmp_path / "rank-1.json").read_text())["plan"] == f"main-{name}"
        finally:
            executable.team.close()
            device.close()
    monkeypatch.setenv("QCN_ALL_REDUCE", "quick")
    with pytest.raises(UsageError, match="QCN_ALL_REDUCE=quick: choose one-shot, nccl, fused"):
        cuda.open_ranks_cuda(folder, read_manifest(folder), 16, 2, None)


@pytest.mark.parametrize("ep", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_rank_of_a_build_meets_the_others(tmp_path: Path, emitted: list[Kernel], ep: int) -> None:
    """All plans of two ranks of the bundled model, and the weights that each binds late, which are half of all."""
    model = locate(None, "cpu").path
    assert model is not None
    manifest = compile_model(model, "h100", tmp_path / "build", quant="fp8", weights="late", tp=2, ep=ep).manifest
    assert all(kernel.family in FAMILIES and kernel.params for kernel in emitted)  # NCCL's own have no parameters
    check_ranks(tmp_path / "build", manifest.ranks, manifest.layout)
    plan = read_plan(tmp_path / "build", manifest.of_rank(1).plans[0])
    layers = int(manifest.model["config"]["num_hidden_layers"])
    assert sum(launch.collective is not None for launch in plan.launches) == 2 * layers + 2
    checkpoint, sizes = Checkpoint(model), []
    for part in manifest.ranks:
        recipes = part.weights["recipes"]
        for row in recipes.values():
            made = dict.fromkeys(row["parts"], 0)
            for name, _, data in pieces(row, checkpoint):
                made[name] += data.nbytes
            assert all(0 <= size - made[name] < ALIGNMENT for name, size in row["parts"].items())
        sizes.append(sum(sum(row["parts"].values()) for row in recipes.values()))
    assert sizes[0] == sizes[1] < 0.62 * int(manifest.decisions["weight_bytes"])
