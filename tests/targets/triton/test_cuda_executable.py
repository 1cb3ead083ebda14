"""A whole build over the fake driver: inputs staged, launches captured once, logits widened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_driver import FakeDriver, arguments

from qcn_compile.artifact import Arg, CacheSpec, Launch, Manifest, Plan, seal, write_json
from qcn_compile.errors import ArtifactError, CapacityError
from qcn_compile.inspect import show, views
from qcn_compile.inspect.build import Build
from qcn_compile.runtime.batch import Span
from qcn_compile.runtime.choice import Pick
from qcn_compile.runtime.cuda import executable as module
from qcn_compile.runtime.cuda.executable import CudaExecutable, open_cuda
from qcn_compile.runtime.cuda.sampling import slot_arrays
from qcn_compile.runtime.profile import Profile
from qcn_compile.runtime.request import Request, SamplingParams

WIDTH = 5


def build(folder: Path, **weights: object) -> tuple[Path, Manifest]:
    """One kernel, one plan for two tokens, a KV cache and a state, dummy weights."""
    (folder / "kernels").mkdir(parents=True)
    row = {"file": "k.cubin", "entry": "k", "shared": 0, "threads": 32, "pdl": True, "pointers": 5, "loose": [4]}
    write_json(folder / "kernels" / "kernels.json", {"k": row})
    (folder / "kernels" / "k.cubin").write_bytes(b"cubin")
    args = (Arg("input", "tokens"), Arg("weight", "w.w"), Arg("state", "kv", part="v"), Arg("state", "delta"),
            Arg("workspace", offset=258))
    plan = Plan("main", "decode-2", 2, 2, 2, 4096, (Launch("k", args, "op %a", "here", 10, 20, (3,)),),
                {"logits": {"offset": 512, "dtype": "bf16", "width": WIDTH}})
    write_json(folder / "plan" / "main.json", plan.to_json())
    spec = {"mode": "dummy", "files": [], "blobs": {"w.w": {"bytes": 1 << 12, "fill": "bf16"}}, **weights}
    caches = (CacheSpec("kv", "kv", "bf16", (1, 4, 8), 2 * 2 * 32), CacheSpec("delta", "delta", "f32", (2, 4), 32))
    manifest = Manifest(1, {}, {"name": "h200", "kind": "gpu", "arch": 90}, {}, caches, 4, 32, WIDTH, 8,
                        ("plan/main.json",), ("kernels/kernels.json",), spec, {})
    return folder, seal(folder, manifest)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    made = FakeDriver()
    monkeypatch.setattr("qcn_compile.runtime.cuda.driver.bindings", lambda: made)
    return made


def opened(tmp_path: Path, **weights: object) -> CudaExecutable:
    return open_cuda(*build(tmp_path / "build", **weights), 16, 2, None)[1]


def test_a_step(fake: FakeDriver, tmp_path: Path) -> None:
    executable = opened(tmp_path)
    (config, addresses), = fake.launches  # captured when loaded, only replayed afterwards
    tokens, weight, values, delta, loose = arguments(addresses, 5)
    assert config.gridDimX == 3 and loose % 16 == 2 and not any(p % 16 for p in (tokens, weight, values, delta))
    logits = np.array([[1.5, -2, 0, 3, 8], [4, 5, 6, 7, -0.5]], np.float32)
    bits = (logits.view(np.uint32) >> 16).astype(np.uint16)
    fake._copy(loose - 258 + 512, bits.ctypes.data, bits.nbytes)
    spans = [Span([7], 3, 1, np.array([5], np.int32), 1), Span([9], 0, 0, np.array([2], np.int32), 1)]
    assert np.array_equal(executable.run(spans), logits)
    device = np.empty(2, np.int32)
    fake._copy(device.ctypes.data, tokens, 8)
    assert device.tolist() == [7, 9] and len(fake.launches) == 1
    assert fake.calls.count("cuGraphLaunch") == 1 and executable.weight_bytes == 1 << 12


def request(slot: int, **params: object) -> Request:
    made = Request("r", [1, 2], SamplingParams(**params), 9, 0)  # type: ignore[arg-type]
    made.slot = slot
    return made


def test_a_step_may_start_before_the_last_is_read(fake: FakeDriver, tmp_path: Path) -> None:
    """Two sets of pinned arrays in turn, and what a pick asks for is on the device before the graph runs."""
    executable = opened(tmp_path)
    places = executable._slot_arrays.places
    span = Span([-1 - 1], 3, 1, np.array([5], np.int32), 1)
    asked = request(1, seed=7, top_k=3, presence_penalty=0.5, logit_bias={2: 1.5})
    first = executable.launch([span], [Pick(asked, 4, 7, None, fresh=True)])
    second = executable.launch([span], [None])
    a, b = (stage.arrays["main-decode-2"].arrays for stage in executable._stages)
    assert a["tokens"][0] == b["tokens"][0] == -2 and a["tokens"].ctypes.data != b["tokens"].ctypes.data
    row = next(c["choice"].reshape(-1, 16)[0] for c in (a, b) if c["choice"][0])
    assert row[:6].tolist() == [7, 1, 3, 7, 0, 4] and row[6:12].view(np.float32).tolist() == [1, 1, 0, 1, 0, 0.5]
    kept = {name: np.empty(2 * size, np.int32) for name, size in slot_arrays(WIDTH).items()}
    for name, array in kept.items():
        fake._copy(array.ctypes.data, places[name], array.nbytes)
    assert kept["history"][WIDTH:].tolist() == [0, 1 << 30, 1 << 30, 0, 0]
    assert kept["bias"].view(np.float32)[WIDTH:].tolist() == [0, 0, 1.5, 0, 0]
    fake._copy(executable._chosen, np.array([3], np.int32).ctypes.data, 4)
    assert executable.launch([span], [None]).tokens().tolist() == [3]  # copied back with every step
    assert len(first.tokens()) == 1 and second.logits().shape == (1, WIDTH)
    executable.check_integrity()


def test_the_profile_launches_one_by_one(fake: FakeDriver, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcn_compile.runtime.cuda.device.CudaDevice.seconds", lambda self, a, b: 2e-6)
    executable = opened(tmp_path)
    executable.profile = Profile()
    executable.run([Span([7], 0, 0, np.array([0], np.int32), 1)])
    assert len(fake.launches) == 2 and "op: k" in "\n".join(executable.profile.lines())


def test_the_memory_plan_is_what_is_taken(fake: FakeDriver, tmp_path: Path) -> None:
    """To the byte, whatever the sizes; what making weights up took is given back."""
    before = fake.free
    executable = opened(tmp_path)
    assert sum(executable.footprint.values()) == before - fake.free
    assert executable.footprint["weights"] == 1 << 12 and executable.footprint["workspace"] == 4096
    shown = views.device(Build.open(tmp_path / "build"), 16, 2)
    assert shown["bytes"] == executable.footprint  # the same caches: two contexts of 16
    assert any(f"{before - fake.free:,d} bytes" in line for line in show.device(shown))


def test_what_does_not_fit(fake: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.free = module.RESERVE
    with pytest.raises(CapacityError, match=r"Fake H200 has 1.1 GB free, weights and workspace need 1.1 GB"):
        opened(tmp_path)


def test_a_misaligned_argument(fake: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcn_compile.runtime.cuda.device.CudaDevice.loose", lambda self, kernel: set())
    with pytest.raises(ArtifactError, match="argument workspace  is not on a 16-byte boundary"):
        opened(tmp_path)


def test_late_weights_want_a_checkpoint(fake: FakeDriver, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="was built without weights: name their checkpoint with --model DIR"):
        opened(tmp_path, mode="late", recipes={}, blobs={})
    with pytest.raises(ArtifactError, match="weights of mode 'magic'"):
        opened(tmp_path / "other", mode="magic", blobs={})
