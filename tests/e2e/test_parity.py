"""The compiled bundled model against transformers in fp32 on the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qcn_compile.artifact import read_manifest
from qcn_compile.runtime.loaded import Model

DATA = Path(__file__).parent.parent / "data"
PROMPTS = ["def fib(n):", "import os\n", "class Stack:\n    def push(self, item):", "for i in range(10):\n",
           "def read_json(path):\n    \"\"\"", "if __name__ == '__main__':", "# sort the list\n", "x = [", "try:\n    ",
           "from collections import", "async def fetch(url):", "def test_add():", "@property\n", "raise ValueError(",
           "with open(name) as f:", "    return self.", "lambda x:", "print(f\"", "def __init__(self,", "while True:\n"]


def relative(got: np.ndarray, want: torch.Tensor) -> float:
    """Relative L2 distance."""
    reference = want.numpy()
    return float(np.linalg.norm(got - reference) / np.linalg.norm(reference))


def heldout(limit: int) -> list[str]:
    rows = (json.loads(line) for line in (DATA / "heldout.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["text"] for row in rows][:limit]


@pytest.mark.parametrize(("variant", "limit"), [("fp32", 1e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("length", [1, 31, 64, 65, 700])
def test_logits(loaded: Callable[[str], Model], reference: Callable[[list[int]], torch.Tensor], variant: str,
                limit: float, length: int) -> None:
    model = loaded(variant)
    tokens = model.encode("\n".join(heldout(3)))[:length]
    assert len(tokens) == length
    assert relative(model.logits(tokens), reference(tokens)) <= limit


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_the_same_for_256_tokens(loaded: Callable[[str], Model],
                                                reference: Callable[[list[int]], torch.Tensor], prompt: str) -> None:
    """By induction over the sequence: each token we chose is transformers' argmax after the tokens before it."""
    model = loaded("fp32")
    tokens = model.encode(prompt)
    made = [t for piece in model.generate(tokens, temperature=0.0, max_tokens=256, ignore_eos=True)
            for t in piece.token_ids]
    assert len(made) == 256
    logits = reference(tokens + made)[len(tokens) - 1:-1]
    best = logits.argmax(-1).tolist()
    wrong = [i for i, (ours, theirs) in enumerate(zip(made, best, strict=True)) if ours != theirs]
    margins = [float(logits[i, best[i]] - logits[i, made[i]]) for i in wrong]
    assert not wrong, f"differs at {wrong}, by these logits: {margins}"


def perplexity(model: Model, texts: list[str]) -> float:
    """exp of the mean negative log likelihood per token, 512 tokens a text."""
    total, count = 0.0, 0
    for text in texts:
        tokens = model.encode(text)[:513]
        logits = torch.from_numpy(model.logits(tokens[:-1])).double()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="sum"))
        count += len(tokens) - 1
    return float(np.exp(total / count))


def test_quantised_perplexity(builds: Callable[[str], Path], loaded: Callable[[str], Model],
                              record_property: Callable[[str, object], None],
                              capsys: pytest.CaptureFixture[str]) -> None:
    texts = heldout(12)  # the rest calibrates
    values = {v: perplexity(loaded(v), texts) for v in ("fp32", "bf16", "int8", "int4", "int4-gptq", "int4-f32")}
    for name, value in values.items():
        record_property(name, value)
    with capsys.disabled():
        print("\nperplexity on held-out text: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
    assert values["bf16"] == pytest.approx(values["fp32"], rel=2e-3)
    assert values["int8"] == pytest.approx(values["fp32"], rel=2e-2)
    assert values["fp32"] < values["int4-f32"] * 1.001 and values["int4"] < 1.35 * values["fp32"]
    assert values["fp32"] < values["int4-gptq"] < values["fp32"] + 0.6 * (values["int4"] - values["fp32"])
    assert read_manifest(builds("int4-gptq")).decisions["reasons"]["calibrated"].startswith("33 weights by ")
