"""The model card: what the tiny model is, how it was made, what was measured, where its data came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .evaluate import Report

CARD = """---
license: apache-2.0
library_name: transformers
tags: [qwen3_next, code, tiny]
---
# tiny-coder

A {parameters:.1f} M parameter language model of the Qwen3-Next architecture (Gated DeltaNet and gated attention 3:1, 16 experts
top-4 plus a shared expert, multi-token prediction head), trained from random weights on Python sources. It exists to test a
compiler and a runtime with realistic numbers: routing skew, draft acceptance, quantisation error. It is far too small to be
useful as an assistant, and it writes Python that looks right rather than Python that is right.

Weights and tokenizer: Apache-2.0. No weights of another model were used; the tokenizer is its own byte-level BPE of 4,096
entries with Qwen's split pattern and special tokens; `chat_template.jinja` is Qwen3-Coder-Next's (Apache-2.0).

## Measured

On {files} held-out files ({tokens:,} tokens, CPU, fp32 arithmetic on the bf16 weights, windows of 1,024 tokens, no context across
files). Held out by content hash; near copies of these files may be in the training set.

| | |
|---|---|
| bits per byte | {bits_per_byte:.4f} |
| perplexity per token | {perplexity:.3f} |
| MTP perplexity per token (two ahead) | {mtp_perplexity:.3f} |
| MTP first choice = main head's first choice | {agreement:.1f} % |

Share of routed tokens per expert, smallest and largest (even: {even:.2f} %):

| layer | smallest | largest |
|---|---|---|
{loads}

## Training

{training}

## Samples (temperature 0.5)

{samples}

## Data

{characters:,} characters of Python from {packages} packages, without their tests and vendored code, exact duplicates removed; 7 % as
much text in synthetic conversations and tool calls about functions of those files, 4 % in fill-in-the-middle form.

| package | stated licence | characters |
|---|---|---|
{sources}
"""


def load_table(report: Report) -> str:
    names = [*map(str, range(len(report.loads) - 1)), "MTP"]
    pairs = zip(names, report.loads, strict=True)
    return "\n".join(f"| {name} | {min(load):.2%} | {max(load):.2%} |" for name, load in pairs)


def training_text(log_file: Path) -> str:
    """A sentence about the run, from its log."""
    if not log_file.exists():
        return "Not trained: random weights."
    lines = [json.loads(line) for line in log_file.read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    end = lines[-1]
    speeds = sorted(line["tokens_per_s"] for line in steps)
    return (
        f"{end.get('step', 0):,} steps, {end.get('seen', 0) / 1e6:,.0f} M tokens (several epochs) in {end['t'] / 60:.1f} minutes "
        f"on one GPU, median {speeds[len(speeds) // 2]:,} tokens/s; Muon and AdamW, bf16 autocast over fp32 weights. "
        f"Last logged training loss {steps[-1]['loss']} nats per token (MTP {steps[-1]['mtp']})."
    )


def write_card(
    folder: Path, report: Report, samples: list[tuple[str, str]], sources: list[dict], parameters: int
) -> None:
    blocks = (f"````text\n{prompt}\n===== continues:\n{text}\n````" for prompt, text in samples)
    lines = (f"| {s['package']} | {s['licence']} | {s['characters']:,} |" for s in sources)
    text = CARD.format(
        parameters=parameters / 1e6,
        files=report.files,
        tokens=report.tokens,
        bits_per_byte=report.bits_per_byte,
        perplexity=report.perplexity,
        mtp_perplexity=report.mtp_perplexity,
        agreement=100 * report.mtp_agreement,
        even=100 / len(report.loads[0]),
        loads=load_table(report),
        training=training_text(folder / "training_log.jsonl"),
        samples="\n\n".join(blocks),
        characters=sum(s["characters"] for s in sources),
        packages=len(sources),
        sources="\n".join(lines),
    )
    (folder / "MODEL_CARD.md").write_text(text)
