"""Measure an exported checkpoint on the held-out files and write its MODEL_CARD.md.

usage: python -m tools.tiny_model.evaluate CHECKPOINT_FOLDER HELDOUT.jsonl SOURCES.json
Everything runs on CPU in fp32 on the bf16 weights that ship.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from .card import write_card
from .config import END_OF_TEXT
from .export import load
from .model import TinyNext
from .sampling import samples

LENGTH = 1024


class Report(NamedTuple):
    """What the model card states."""

    files: int
    tokens: int
    bits_per_byte: float
    perplexity: float  # per token
    mtp_perplexity: float  # per token, two ahead
    mtp_agreement: float  # share of positions where the MTP head's first choice is the main head's
    loads: list[list[float]]  # per layer (MTP last): each expert's share of the routed tokens


def rows(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Each file on its own, after an end-of-text token, cut into windows of LENGTH."""
    out = []
    for text in texts:
        ids = [END_OF_TEXT, *tokenizer.encode(text, add_special_tokens=False).ids, END_OF_TEXT]
        starts = range(0, max(1, len(ids) - 4), LENGTH)  # a remainder too short for the MTP head joins the last window
        out += [ids[i : i + LENGTH + 1] for i in starts[:-1]] + [ids[starts[-1] :]]
    return out


@torch.no_grad()
def measure_row(model: TinyNext, row: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> ([main nats, MTP nats, agreements, main tokens, MTP tokens], router loads x tokens)."""
    ids = torch.tensor([row])
    hidden, routers = model.hidden(ids[:, :-1])
    logits = model.lm_head(hidden)[0]
    nats = F.cross_entropy(logits, ids[0, 1:], reduction="sum")
    drafted, draft_router = model.draft(ids[:, 1:-1], hidden[:, :-1])
    draft_logits = model.lm_head(drafted)[0]
    draft_nats = F.cross_entropy(draft_logits, ids[0, 2:], reduction="sum")
    agreements = (draft_logits.argmax(-1) == logits[1:].argmax(-1)).float().sum()
    counts = torch.tensor([len(row) - 1.0, len(row) - 2.0])
    loads = torch.cat([routers, draft_router])[:, 2:] * len(row)
    return torch.cat([torch.stack([nats, draft_nats, agreements]), counts]), loads


def measure(model: TinyNext, tokenizer: Tokenizer, texts: list[str]) -> Report:
    sums, loads = torch.zeros(5, dtype=torch.float64), 0
    for row in rows(tokenizer, texts):
        numbers, load_sum = measure_row(model, row)
        sums += numbers
        loads = loads + load_sum
    nats, draft_nats, agreements, tokens, draft_tokens = sums.tolist()
    size = sum(len(t.encode()) for t in texts)
    return Report(
        files=len(texts),
        tokens=int(tokens),
        bits_per_byte=nats / math.log(2) / size,
        perplexity=math.exp(nats / tokens),
        mtp_perplexity=math.exp(draft_nats / draft_tokens),
        mtp_agreement=agreements / draft_tokens,
        loads=(loads / loads.sum(-1, keepdim=True)).tolist(),
    )


def main(checkpoint: Path, heldout_file: Path, sources_file: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    model = load(checkpoint).eval()
    texts = [json.loads(line)["text"] for line in heldout_file.read_text().splitlines()]
    report = measure(model, tokenizer, texts)
    print({k: v for k, v in report._asdict().items() if k != "loads"})
    texts_out = samples(model, tokenizer)
    for prompt, continuation in texts_out:
        print("-----", prompt, "=====", continuation, sep="\n")
    parameters = sum(p.numel() for p in model.parameters())
    write_card(checkpoint, report, texts_out, json.loads(sources_file.read_text()), parameters)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
