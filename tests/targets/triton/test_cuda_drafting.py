"""The draft head over the fake driver: its plans beside the main model's, hidden states there and back, the choice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_driver import FakeDriver, arguments
from test_cuda_executable import WIDTH, build

from qcn_compile.artifact import Arg, Launch, Plan, read_manifest, seal, write_json
from qcn_compile.inspect import views
from qcn_compile.inspect.build import Build
from qcn_compile.runtime.batch import Span
from qcn_compile.runtime.cuda.executable import CudaExecutable, open_cuda

HIDDEN, PAGE = 8, np.array([3], np.int32)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    made = FakeDriver()
    monkeypatch.setattr("qcn_compile.runtime.cuda.driver.bindings", lambda: made)
    return made


def with_head(folder: Path) -> Path:
    """The build of test_cuda_executable, with hidden states and a head whose plans have the main model's names."""
    path, manifest = build(folder)
    for entry, names in (("main", ("tokens", "tokens")), ("mtp", ("hidden", "choice"))):
        args = (*(Arg("input", name) for name in names), Arg("state", "kv", part="v"), Arg("state", "delta"),
                Arg("workspace", offset=258))
        plan = Plan(entry, "decode-2", 2, 2, 2, 4096, (Launch("k", args, "op %a", "here", 10, 20, (3,)),),
                    {"logits": {"offset": 512, "dtype": "bf16", "width": WIDTH},
                     "hidden": {"offset": 1024, "dtype": "bf16", "width": HIDDEN}})
        write_json(path / "plan" / f"{entry}.json", plan.to_json())
    fields = {**read_manifest_fields(manifest), "plans": ("plan/main.json", "plan/mtp.json")}
    seal(path, type(manifest)(**fields))
    return path


def read_manifest_fields(manifest: object) -> dict[str, object]:
    return {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}  # type: ignore[attr-defined]


def opened(path: Path) -> CudaExecutable:
    return open_cuda(path, read_manifest(path), 16, 2, None, speculate=True)[1]


def test_hidden_states_go_to_the_head_and_its_own_come_back(fake: FakeDriver, tmp_path: Path) -> None:
    before = fake.free
    path = with_head(tmp_path / "build")
    executable = opened(path)
    assert sum(executable.footprint.values()) == before - fake.free
    assert executable.footprint["draft inputs"] == 256
    assert views.device(Build.open(path), 16, 2)["bytes"]["draft inputs"] == 256
    (_, main), (_, head) = fake.launches  # both captured when loaded
    states, choice, _, _, workspace = arguments(head, 5)
    made = np.arange(2 * HIDDEN, dtype=np.uint16)
    fake._copy(workspace - 258 + 1024, made.ctypes.data, made.nbytes)
    fake._copy(executable._chosen, np.array([3, -1], np.int32).ctypes.data, 8)

    executable.run([Span([2], 4, 1, PAGE, 1)])
    assert np.array_equal(executable.hidden(), made[:HIDDEN].reshape(1, HIDDEN))
    given = np.arange(100, 100 + 2 * HIDDEN, dtype=np.uint16).reshape(2, HIDDEN)
    tokens = executable.draft([Span([4], 3, 1, PAGE, 1), Span([1], 5, 0, PAGE, 1)], given)
    assert tokens.tolist() == [[3, 0]]  # logits that are no numbers give some token
    assert np.array_equal(executable.hidden(), made.reshape(2, HIDDEN))
    for place, want in ((states, given), (choice, executable._inputs.arrays["choice"])):
        got = np.empty_like(want)
        fake._copy(got.ctypes.data, place, got.nbytes)
        assert np.array_equal(got, want)
    rows = executable._inputs.arrays["choice"].reshape(2, 16)
    assert rows[:, :3].tolist() == [[1, 1, 0], [1, 0, 0]] and not rows[:, 6].any()  # likeliest, as it is
    assert fake.calls.count("cuGraphLaunch") == 2 and arguments(main, 5) != arguments(head, 5)
    executable.check_integrity()


def test_rounds_go_on_from_the_token_and_the_state_on_the_device(fake: FakeDriver, tmp_path: Path) -> None:
    executable = opened(with_head(tmp_path / "build"))
    states, _, _, _, workspace = arguments(fake.launches[1][1], 5)
    made = np.arange(2 * HIDDEN, dtype=np.uint16)
    fake._copy(workspace - 258 + 1024, made.ctypes.data, made.nbytes)
    fake._copy(executable._chosen, np.array([3, 1], np.int32).ctypes.data, 8)
    seen = []
    start = executable._start
    executable._start = lambda plan, *rest: seen.append(  # type: ignore[method-assign]
        {name: executable._inputs.arrays[name].copy() for name in ("tokens", "context_lens", "cu_seqlens")}
    ) or start(plan, *rest)
    tokens = executable.draft([Span([4, 2], 3, 1, PAGE, 1)], np.ones((2, HIDDEN), np.uint16), rounds=3)
    assert tokens.tolist() == [[3]] * 3 and fake.calls.count("cuGraphLaunch") == 3
    assert [s["tokens"][0] for s in seen] == [4, -2, -2] and [s["context_lens"][0] for s in seen] == [3, 5, 6]
    got = np.empty(HIDDEN, np.uint16)
    fake._copy(got.ctypes.data, states, got.nbytes)
    assert np.array_equal(got, made[:HIDDEN])  # of the one token of the second round, not the host's
    executable.check_integrity()
