"""Builds of the bundled model, made once per test run and shared by all workers."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from qcn_compile import artifact, load
from qcn_compile.compile import compile as build
from qcn_compile.frontend.checkpoint import locate
from qcn_compile.runtime.loaded import Model
from tests.sharing import one_trace

HELDOUT = Path(__file__).parent.parent / "data/heldout.jsonl"
EVALUATED = 12  # of its files perplexity is measured on, the others calibrate
VARIANTS: dict[str, dict[str, object]] = {
    "fp32": {"dtype": "fp32", "quant": "none"},
    "bf16": {"dtype": "bf16", "quant": "none"},
    "mtp": {"dtype": "bf16", "quant": "none", "mtp": True},
    "bf16-states": {"dtype": "bf16", "quant": "none", "states": "bfloat16"},
    "int8": {"dtype": "bf16", "quant": "int8"},
    "int4": {"dtype": "bf16", "quant": "int4"},
    "int4-gptq": {"dtype": "bf16", "quant": "int4", "calibrate": "calibration.jsonl"},
    "fp32-tp2": {"dtype": "fp32", "quant": "none", "tp": 2, "mtp": True},
    "int4-f32": {"dtype": "bf16", "quant": "int4", "activations": "fp32"},
}


@pytest.fixture(scope="session")
def bundled() -> Path:
    """The checkpoint that ships with the project."""
    path = locate(None, "cpu").path
    assert path is not None
    return path


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`builds("int8")`: the folder of that build, compiled at most once however many workers ask."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "qcn-builds"  # of this run only
    shared.mkdir(exist_ok=True)

    def make(variant: str) -> Path:
        folder = shared / variant
        with (shared / f"{variant}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "manifest.json").is_file():
                options = dict(VARIANTS[variant])
                if "calibrate" in options:
                    options["calibrate"] = shared / str(options["calibrate"])
                    options["calibrate"].write_text("\n".join(HELDOUT.read_text(encoding="utf-8").splitlines()[EVALUATED:]))
                with one_trace():
                    build(None, "cpu", folder, **options)
        artifact.read_manifest(folder, deep=True)
        return folder

    return make


@pytest.fixture(scope="session")
def loaded(builds: Callable[[str], Path]) -> Iterator[Callable[[str], Model]]:
    """`loaded("fp32")`: the running model of a build."""
    open_models: dict[str, Model] = {}

    def get(variant: str) -> Model:
        if variant not in open_models:
            open_models[variant] = load(builds(variant), max_running_requests=8, threads=2)
        return open_models[variant]

    yield get
    for model in open_models.values():
        model.check_integrity()
        model.close()


@pytest.fixture(scope="session")
def reference(bundled: Path) -> Callable[[list[int]], torch.Tensor]:
    """transformers in fp32 on the same weights: token ids -> logits f32 [T, vocab]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bundled, dtype=torch.float32, attn_implementation="eager").eval()

    @torch.no_grad()
    def logits(tokens: list[int]) -> torch.Tensor:
        return model(torch.tensor([tokens]), use_cache=False).logits[0]

    return logits
