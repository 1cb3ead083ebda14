"""Perplexity and speed of a build, for the examples that change what a model computes."""

import json
import time
from pathlib import Path

import numpy as np

import qcn_compile as qcn

HELD_OUT = Path(__file__).parents[2] / "tests/data/heldout.jsonl"  # code that the bundled model was not trained on


def held_out(documents: int = 8, characters: int = 1500) -> list[str]:
    """Texts to measure on."""
    lines = HELD_OUT.read_text(encoding="utf-8").splitlines()[:documents]
    return [json.loads(line)["text"][:characters] for line in lines]


def perplexity(build: str | Path, texts: list[str]) -> float:
    """exp of the mean negative log likelihood of a token."""
    losses: list[np.ndarray] = []
    with qcn.load(build) as model:
        for text in texts:
            tokens = model.encode(text)
            logits = model.logits(tokens)[:-1].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            likelihood = logits[np.arange(len(logits)), tokens[1:]] - np.log(np.exp(logits).sum(-1))
            losses.append(-likelihood)
    return float(np.exp(np.concatenate(losses).mean()))


def tokens_per_second(build: str | Path, tokens: int = 256) -> float:
    """Decode speed of one sequence on this machine, best of five."""
    best = float("inf")
    with qcn.load(build) as model:
        for _ in range(5):
            started = time.perf_counter()
            stream = model.generate("def ", max_tokens=tokens, temperature=0, ignore_eos=True)
            made = sum(len(output.token_ids) for output in stream)
            best = min(best, (time.perf_counter() - started) / max(made, 1))
    return 1 / best


def weight_megabytes(build: str | Path) -> float:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in Path(build).glob("weights/*")) / 1e6


def report(name: str, build: str | Path, texts: list[str]) -> float:
    """Print one line for a build; returns its perplexity."""
    value = perplexity(build, texts)
    print(f"{name:24} perplexity {value:8.3f}   weights {weight_megabytes(build):6.2f} MB   "
          f"{tokens_per_second(build):7.1f} tokens/s")
    return value
