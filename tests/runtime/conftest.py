"""A hand-made build of a toy model behind the real ABI, its reference in NumPy, and a byte-level tokenizer for it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qcn_compile.artifact import SCHEMA, Arg, CacheSpec, Launch, Manifest, Plan, seal, write_json
from qcn_compile.runtime.loaded import Model, load

VOCAB, PAGE, CONTEXT = 512, 4, 128
SOURCE = Path(__file__).with_name("toy.c")
BUCKETS = (("decode-1", 1, 1, 1), ("decode-4", 4, 4, 4), ("prefill-16", 16, 4, 16), ("prefill-32", 32, 6, 8))
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def toy_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {"u": rng.normal(size=VOCAB).astype(np.float32), "w": rng.normal(size=VOCAB).astype(np.float32)}


def toy_logits(tokens: list[int]) -> np.ndarray:
    """The toy model in NumPy: f32 [T] tokens -> f32 [T, VOCAB]."""
    weights = toy_weights()
    position = np.arange(len(tokens))
    x = weights["u"][tokens] * (1 + np.float32(0.01) * (position % 7))
    state, rows = np.float32(0), []
    share = 1 + 0.1 * (position % 5)
    for t in range(len(tokens)):
        state = np.float32(0.7) * state + x[t]
        mean = (share[:t + 1] * x[:t + 1]).sum() / share[:t + 1].sum()
        rows.append(4 * np.sin(weights["w"] * (1 + state + 3 * mean) + 0.1 * np.arange(VOCAB)))
    return np.array(rows, np.float32)


def toy_plan(name: str, tokens: int, sequences: int, rows: int) -> Plan:
    size = 4 * -(-tokens // 16) * 16
    x, y, z = (Arg("workspace", offset=i * size) for i in range(3))
    out = Arg("output", "logits", 3 * size)

    def given(*names: str) -> tuple[Arg, ...]:
        return tuple(Arg("input", name) for name in names)

    k, v = Arg("state", "kv.0", part="k"), Arg("state", "kv.0", part="v")
    calls = {
        "toy_embed": (*given("counts", "tokens", "positions"), Arg("weight", "u"), x),
        "toy_state": (*given("counts", "cu_seqlens", "context_lens", "slots", "into"), Arg("state", "delta.0"), x, y),
        "toy_attention": (*given("counts", "positions", "token_seq", "context_lens", "block_table"), k, v, x, z),
        "toy_logits": (*given("counts", "rows"), y, z, Arg("weight", "w"), out),
    }
    launches = tuple(Launch(kernel, args, kernel[4:], f"toy:{kernel}", bytes=4 * tokens)
                     for kernel, args in calls.items())
    return Plan("main", name, tokens, sequences, rows, 3 * size + 4 * rows * VOCAB, launches,
                {"logits": {"offset": 3 * size, "dtype": "f32", "width": VOCAB}})


def write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 4, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    source = Path(__file__).read_text(encoding="utf-8")
    backend.train_from_iterator([source, "naïve café — 你好 🙂👩‍👩‍👧 "] * 3, trainer)
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    backend.add_tokens([AddedToken("<tool_call>", special=False)])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    eos = backend.token_to_id("<|im_end|>")
    write_json(folder / "generation_config.json", {"eos_token_id": [eos, eos - 2], "do_sample": True,
                                                   "temperature": 0.8, "top_k": 40, "top_p": 0.95})
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>", "chat_template": TEMPLATE})


def compile_toy(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, flags in (("libqcnhost.so", ["-DHOST", "-D_GNU_SOURCE"]), ("toy.so", [])):
        subprocess.run(["gcc", "-O1", "-w", "-shared", "-fPIC", f"-DVOCAB={VOCAB}", *flags, str(SOURCE), "-o",
                        str(folder / name), "-lm", "-ldl"], check=True)


def make_toy(build: Path) -> Path:
    compile_toy(build / "kernels")
    write_tokenizer(build / "tokenizer")
    (build / "weights").mkdir()
    save_file(toy_weights(), build / "weights" / "model.safetensors")
    plans = [toy_plan(*bucket) for bucket in BUCKETS]
    for plan in plans:
        write_json(build / "plan" / f"main-{plan.name}.json", plan.to_json())
    caches = (CacheSpec("kv.0", "kv", "f32", (1, 1, 16), 128), CacheSpec("delta.0", "delta", "f32", (16,), 64))
    seal(build, Manifest(
        schema=SCHEMA, model={"name": "toy"}, target={"name": "cpu"}, decisions={}, caches=caches, page_size=PAGE,
        context_length=CONTEXT, vocab_size=VOCAB, hidden_size=1, plans=tuple(f"plan/main-{p.name}.json" for p in plans),
        libraries=("kernels/libqcnhost.so", "kernels/toy.so"),
        weights={"mode": "copied", "files": ["weights/model.safetensors"]}, tools={}))
    return build


@pytest.fixture(scope="session")
def toy_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed build of the toy model; copy it before changing it (`toy_copy`)."""
    return make_toy(tmp_path_factory.mktemp("toy") / "build")


@pytest.fixture
def toy_copy(toy_build: Path, tmp_path: Path) -> Path:
    """A build of one's own, to damage."""
    return Path(shutil.copytree(toy_build, tmp_path / "build"))


@pytest.fixture
def model(toy_build: Path) -> Iterator[Model]:
    with load(toy_build, threads=1) as loaded:
        yield loaded
        loaded.check_integrity()


@pytest.fixture
def reseal() -> Callable[[Path, dict[str, object]], None]:
    """Change manifest fields of a build and seal it again."""

    def change(build: Path, fields: dict[str, object]) -> None:
        data = json.loads((build / "manifest.json").read_text())
        data.pop("self_sha256")
        seal(build, Manifest.from_json({**data, **fields}))

    return change


@pytest.fixture(scope="session")
def reference() -> Callable[[list[int]], np.ndarray]:
    """The toy model's logits from NumPy."""
    return toy_logits
