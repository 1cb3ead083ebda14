"""The device path on the toy build: chunked = whole, batched = alone, errors that name the kernel."""

from __future__ import annotations

import random

import numpy as np
import pytest

from qcn_compile.artifact import Launch, Plan
from qcn_compile.errors import ArtifactError, CapacityError, DeviceError, UsageError
from qcn_compile.runtime.loaded import load
from qcn_compile.runtime.profile import Profile


def tokens_of(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, 500) for _ in range(count)]


@pytest.mark.parametrize("length", [1, 3, 16, 17, 32, 33, 100, 128])
def test_logits_match_the_reference(model, reference, length):
    tokens = tokens_of(length, length)
    got = model.logits(tokens)
    assert got.shape == (length, 512) and got.dtype == np.float32
    np.testing.assert_allclose(got, reference(tokens), atol=2e-4)


def test_any_chunking_equals_the_whole(model):
    tokens = tokens_of(1, 60)
    whole = model.logits(tokens)
    for seed in range(8):
        rng, start, rows = random.Random(seed), 0, []
        while start < len(tokens):
            count = rng.randint(1, 16)
            rows += model.step([("s", tokens[start:start + count])])
            start += count
        model.release("s")
        np.testing.assert_array_equal(np.concatenate(rows), whole)


def test_ragged_batch_equals_one_at_a_time(model):
    prompts = {name: tokens_of(i, n) for i, (name, n) in enumerate([("a", 9), ("b", 40), ("c", 1), ("d", 25)])}
    got = {name: [] for name in prompts}
    done = dict.fromkeys(prompts, 0)
    rng = random.Random(3)
    while any(done[name] < len(prompts[name]) for name in prompts):
        live = [name for name in prompts if done[name] < len(prompts[name])]
        rng.shuffle(live)
        batch = [(name, prompts[name][done[name]:done[name] + rng.randint(1, 4)]) for name in live]
        for (name, part), rows in zip(batch, model.step(batch), strict=True):
            done[name] += len(part)
            got[name].append(rows)
        model.check_integrity()
    for name in prompts:
        model.release(name)
    for name, tokens in prompts.items():
        np.testing.assert_array_equal(np.concatenate(got[name]), model.logits(tokens))


def test_a_slot_and_pages_used_before_leave_no_trace(model):
    tokens = tokens_of(2, 30)
    first = model.logits(tokens)
    model.logits(tokens_of(9, 128))
    np.testing.assert_array_equal(model.logits(tokens), first)


def test_smallest_plan_is_chosen(model):
    choose = model.executable.select
    sizes = {"decode-1": [(1, 1, 1), (1, 1, 0)], "decode-4": [(2, 2, 2)], "prefill-16": [(5, 1, 1), (16, 4, 16)],
             "prefill-32": [(17, 1, 1), (6, 6, 6)]}
    for name, steps in sizes.items():
        assert {choose(*size).name for size in steps} == {name}
    with pytest.raises(CapacityError, match=r"33 tokens, 1 sequences and 1 rows .*\(decode-1, .*prefill-32\)"):
        choose(33, 1, 1)


def test_a_failed_step_names_kernel_and_op(model):
    with pytest.raises(DeviceError, match=r"toy_embed of op embed \(toy:toy_embed\) failed.*toy kernel refused"):
        model.logits([5] * 77 + [3])
    model.check_integrity()


def test_a_step_that_does_not_fit_changes_nothing(model):
    model.step([("a", [1, 2, 3])])
    with pytest.raises(CapacityError):
        model.step([("a", [4]), ("b", [5] * 40)])
    with pytest.raises(UsageError, match="each only once"):
        model.step([("a", [4]), ("a", [5])])
    rows = model.step([("a", [4])])[0]
    model.release("a")
    np.testing.assert_array_equal(rows[0], model.logits([1, 2, 3, 4])[3])


def test_bad_tokens_and_lengths(model):
    for tokens, words in [([], "empty"), ([1, 512], "token 512 at position 1 .* 512"), ([-1], "token -1"),
                          (["a"], "whole numbers"), ([1.5], "whole numbers")]:
        with pytest.raises(UsageError, match=words):
            model.logits(tokens)
    with pytest.raises(CapacityError, match="context of 128"):
        model.logits([1] * 129)
    model.check_integrity()


def test_huge_pages_and_mapped_weights_agree(toy_build, model):
    tokens = tokens_of(4, 20)
    seen = []
    with load(toy_build, threads=1, huge_pages=True, report=lambda *row: seen.append(row)) as other:
        np.testing.assert_array_equal(other.logits(tokens), model.logits(tokens))
    assert seen and seen[-1][1] == seen[-1][2] > 0


def test_two_models_share_the_thread_pool(toy_build):
    first, second = load(toy_build, threads=1), load(toy_build, threads=1)
    with pytest.raises(UsageError, match="open in this process with 1 threads"):
        load(toy_build, threads=2)
    first.close()
    first.close()
    assert second.logits([1, 2]).shape == (2, 512)
    with pytest.raises(UsageError, match="closed"):
        first.logits([1])
    second.close()


def test_memory_budget(toy_build):
    with load(toy_build, threads=1, context_length=64, max_running_requests=2) as model:
        assert (model.memory.pages, model.memory.slots, model.memory.tokens) == (32, 2, 128)
        with pytest.raises(CapacityError, match="context of 64"):
            model.logits([1] * 65)
    with load(toy_build, threads=1, cache_memory=4 * 64 + 40 * 128) as model:
        assert model.memory.pages == 40
    with pytest.raises(CapacityError, match="lower --context-length"):
        load(toy_build, threads=1, cache_memory=1000)
    with pytest.raises(UsageError, match="1 to 128"):
        load(toy_build, context_length=129)


def test_profile_counts_every_launch(model):
    model.executable.profile = Profile()
    model.logits([1] * 40)
    rows = model.executable.profile.rows("prefill-16")
    assert sorted(r.kernels for r in rows) == [("toy_attention",), ("toy_embed",), ("toy_logits",), ("toy_state",)]
    assert all(r.calls == 3 and r.seconds > 0 and r.bytes == 3 * 64 for r in rows)
    text = list(model.executable.profile.lines())
    assert text[0].startswith("plan prefill-16: 3 steps") and "GB/s" in text[1]


def test_profile_gives_an_ops_bytes_to_all_its_kernels():
    launches = (Launch("sort", (), "moe %1", "", 100), Launch("up", (), "moe %1", ""),
                Launch("norm", (), "norm %2", "", 7))
    profile = Profile()
    for _ in range(2):
        profile.add(Plan("main", "p", 1, 1, 1, 0, launches, {}), np.array([1.0, 3.0, 2.0]))
    moe, norm = profile.rows("p")
    assert (moe.op, moe.kernels, moe.seconds, moe.bytes, moe.calls) == ("moe", ("sort", "up"), 8.0, 200, 2)
    assert (norm.seconds, norm.bytes, norm.gigabytes_per_second) == (4.0, 14, 14 / 4e9)
    assert [line.split()[-1] for line in profile.lines()][2:] == ["moe", "sort", "up", "norm"]


@pytest.mark.parametrize(("change", "words"), [
    ({"libraries": []}, "null target"),
    ({"libraries": ["kernels/libqcnhost.so"]}, "no library of the build has the kernel toy_embed"),
    ({"libraries": ["kernels/toy.so", "kernels/toy.so"]}, "no host library of this version"),
    ({"libraries": ["kernels/toy.c", "kernels/toy.so"]}, "cannot load"),
    ({"libraries": ["kernels/libqcnhost.so", "kernels/toy.c"]}, "cannot load"),
    ({"weights": {"mode": "late", "files": []}}, "mode 'late'"),
    ({"weights": {"mode": "copied", "files": []}}, "lack the blob u"),
    ({"caches": []}, "does not know: state"),
    ({"caches": [{"name": "kv.0", "kind": "kv", "dtype": "f32", "shape": [1, 1, 16], "unit_bytes": 64}]},
     "needs 128 bytes for keys and values, the manifest says 64"),
    ({"target": {"kind": "cpu", "mcpu": "later", "features": "avx2 quantum"}},
     "made for later, this processor lacks quantum"),
    ({"plans": []}, "no plan of the entry main"),
])
def test_builds_that_do_not_fit_together(toy_copy, reseal, change, words):
    (toy_copy / "kernels" / "toy.c").write_text("int x;")
    reseal(toy_copy, change)
    with pytest.raises(ArtifactError, match=words), load(toy_copy, threads=1) as model:
        model.logits([1])
    with pytest.raises(ArtifactError):  # the thread pool was given back: a second try fails the same way
        load(toy_copy, threads=2).logits([1])


def test_a_damaged_weight_file(toy_copy, reseal):
    path = toy_copy / "weights" / "model.safetensors"
    for data in (b"\xff" * 64, b"\x02", (8).to_bytes(8, "little") + b"not json"):
        path.write_bytes(data)
        reseal(toy_copy, {})
        with pytest.raises(ArtifactError, match="no safetensors file of ours"):
            load(toy_copy, threads=1)
