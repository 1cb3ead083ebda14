"""Train the 4096-entry byte-level BPE with Qwen3's pipeline: NFC, its split pattern, its added tokens and their flags.

usage: python -m tools.tiny_model.build_tokenizer WORK_FOLDER CHAT_TEMPLATE.jinja OUT_FOLDER
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from .config import ADDED_START, PLAIN_TOKENS, SPECIAL_TOKENS, VOCAB_SIZE, TinyConfig

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SAMPLE_CHARACTERS = 80_000_000
ROUND_TRIP = (
    "def f(x):\n    return x ** 2  # naïve café — 東京 🙂\n",
    "<|im_start|>user\nhi<|im_end|>\n<tool_call>\n<function=run>\n</function>\n</tool_call>",
    "\t\r\n  \n\n x = 'it''s' + \"I'LL\"\n12345\u00a0\u200b<think>\n\n</think>",
)


def untrained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    return tokenizer


def train(texts: list[str]) -> Tokenizer:
    """BPE merges from the texts, then the added tokens, so that their ids are the last ones."""
    tokenizer = untrained()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=ADDED_START, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == ADDED_START
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN_TOKENS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def tokenizer_config() -> dict:
    """tokenizer_config.json, worded as Qwen3's."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(ADDED_START + i): {"content": token, **flags, "special": token in SPECIAL_TOKENS}
        for i, token in enumerate(SPECIAL_TOKENS + PLAIN_TOKENS)
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": TinyConfig().max_position_embeddings,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def check(folder: Path) -> None:
    """Round trips, and transformers' AutoTokenizer gives the same ids as the bare tokenizer."""
    from transformers import AutoTokenizer

    bare, auto = Tokenizer.from_file(str(folder / "tokenizer.json")), AutoTokenizer.from_pretrained(folder)
    for text in ROUND_TRIP:
        ids = bare.encode(text, add_special_tokens=False).ids
        assert bare.decode(ids, skip_special_tokens=False) == text, text
        assert auto.encode(text, add_special_tokens=False) == ids, text
        assert auto.decode(ids) == text, text
    assert auto.chat_template and auto.eos_token_id == ADDED_START + 2 and len(auto) == VOCAB_SIZE


def sample(work: Path) -> list[str]:
    with (work / "documents.jsonl").open() as lines:
        texts = [json.loads(line)["text"] for line in lines]
    random.Random(0).shuffle(texts)
    total, count = 0, 0
    while count < len(texts) and total < SAMPLE_CHARACTERS:
        total += len(texts[count])
        count += 1
    return texts[:count]


def main(work: Path, template: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train(sample(work))
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(), indent=2) + "\n")
    shutil.copyfile(template, out / "chat_template.jinja")
    check(out)
    print(f"{VOCAB_SIZE} entries in {out}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
