"""Turn documents and synthetic conversations into one compressed token stream, documents ended by <|endoftext|>.

usage: python -m tools.tiny_model.pretokenize WORK_FOLDER CHECKPOINT_FOLDER HELDOUT.jsonl OUT_FOLDER
Writes OUT_FOLDER/train.xz and heldout.xz (uint16, xz) and data.json (counts and bytes per token).
"""

from __future__ import annotations

import json
import lzma
import random
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .config import END_OF_TEXT
from .dialogues import conversations, fill_in_middle
from .snippets import Snippet, extract

CHAT_SHARE, FIM_SHARE, REPOSITORY_SHARE = 0.07, 0.04, 0.08
FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 29, "lc": 1, "lp": 1, "pb": 1}
]


def with_repository_header(document: dict) -> str:
    name = document["package"].rsplit(" ", 1)[0]
    return f"<|repo_name|>{name}\n<|file_sep|>{document['path']}\n{document['text']}"


def assemble(documents: list[dict], template: Path, rng: random.Random) -> list[str]:
    """All training texts; order is kept for compression, the loader shuffles."""
    texts: list[str] = []
    snippets: list[Snippet] = []
    for document in documents:
        headed = rng.random() < REPOSITORY_SHARE
        texts.append(with_repository_header(document) if headed else document["text"])
        snippets += extract(document["path"], document["text"])
    size = sum(map(len, texts))
    middle = 0
    while middle < FIM_SHARE * size:
        texts.append(fill_in_middle(rng.choice(documents)["text"], rng))
        middle += len(texts[-1])
    chat = conversations(snippets, template, int(CHAT_SHARE * size), rng)
    print(f"{len(documents)} files ({size:,} characters), {len(snippets)} functions, {len(chat)} conversations")
    return texts + chat


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    parts: list[np.ndarray] = []
    for start in range(0, len(texts), 512):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 512], add_special_tokens=False):
            parts.append(np.array([*encoding.ids, END_OF_TEXT], dtype="<u2"))
    return np.concatenate(parts)


def compress(ids: np.ndarray, path: Path) -> None:
    path.write_bytes(lzma.compress(ids.tobytes(), format=lzma.FORMAT_XZ, filters=FILTERS))
    print(f"{path.name}: {len(ids):,} tokens, {path.stat().st_size:,} bytes")


def read_texts(path: Path) -> list[dict]:
    with path.open() as lines:
        return [json.loads(line) for line in lines]


def main(work: Path, checkpoint: Path, heldout_file: Path, out: Path) -> None:
    rng = random.Random(0)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    out.mkdir(parents=True, exist_ok=True)
    heldout = [d["text"] for d in read_texts(heldout_file)]
    ids = encode(tokenizer, heldout)
    compress(ids, out / "heldout.xz")
    size = sum(len(t.encode()) for t in heldout)
    texts = assemble(read_texts(work / "documents.jsonl"), checkpoint / "chat_template.jinja", rng)
    train = encode(tokenizer, texts)
    facts = {"train_tokens": len(train), "heldout_tokens": len(ids), "heldout_bytes": size}
    (out / "data.json").write_text(json.dumps(facts) + "\n")
    compress(train, out / "train.xz")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
