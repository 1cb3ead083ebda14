"""Sample text from the training model: no cache, the whole prefix again for every token, so for short samples only."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from .config import END_OF_TEXT, IM_END
from .model import TinyNext

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = (
    "import os\n\n\ndef read_lines(path):\n",
    'class Stack:\n    """A last-in first-out container."""\n\n    def __init__(self):\n',
    CHAT.format("Write a Python function `count_words`: count the words in a text."),
    CHAT.format("Hello"),
    "<|fim_prefix|>def add(a, b):\n    <|fim_suffix|>\n\n\nprint(add(1, 2))\n<|fim_middle|>",
)


@torch.no_grad()
def generate(model: TinyNext, ids: list[int], count: int, temperature: float, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    new: list[int] = []
    for _ in range(count):
        hidden, _ = model.hidden(torch.tensor([ids + new]))
        logits = model.lm_head(hidden[0, -1])
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        new.append(token)
        if token in (END_OF_TEXT, IM_END):
            break
    return new


def samples(model: TinyNext, tokenizer: Tokenizer, count: int = 96, temperature: float = 0.5) -> list[tuple[str, str]]:
    """-> (prompt, continuation) for each of the fixed prompts."""
    out = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        new = generate(model, ids, count, temperature)
        out.append((prompt, tokenizer.decode(new, skip_special_tokens=False)))
    return out
