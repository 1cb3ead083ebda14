"""The build's tokenizer: text to ids, ids to bytes, end tokens and the model's own sampling defaults."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcn_compile.errors import ArtifactError
from qcn_compile.runtime.chat import ChatTemplate

if TYPE_CHECKING:
    import tokenizers

FOLDER = "tokenizer"
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table), as character -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


@dataclass(frozen=True)
class GenerationDefaults:
    """generation_config.json: tokens that end a text, and sampling fields where the model names them."""

    eos_token_ids: frozenset[int]
    sampling: dict[str, float]

    @staticmethod
    def read(path: Path) -> GenerationDefaults:
        """Defaults of a build; none when the file is absent."""
        data = _read_json(path)
        eos = data.get("eos_token_id")
        ids = [] if eos is None else [eos] if isinstance(eos, int) else eos
        sampling = {name: data[name] for name in _SAMPLING if data.get(name) is not None}
        if data.get("do_sample") is False:
            sampling["temperature"] = 0.0
        return GenerationDefaults(frozenset(ids), sampling)


class Tokenizer:
    """A byte-level BPE tokenizer. Raises ArtifactError when the build has none, or one of another kind."""

    def __init__(self, build: Path) -> None:
        folder = build / FOLDER
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ArtifactError(f"{build} has no tokenizer: only token ids can be given; "
                                "build again from a checkpoint with tokenizer.json to use text")
        from tokenizers import Tokenizer as Backend

        self.backend: tokenizers.Tokenizer = Backend.from_file(str(path))
        if type(self.backend.decoder).__name__ != "ByteLevel":
            raise ArtifactError(f"{path} is no byte-level tokenizer, the only kind this runtime reads")
        self._folder = folder
        self.defaults = GenerationDefaults.read(folder / "generation_config.json")
        self._alphabet = byte_alphabet()
        self._bytes: dict[int, bytes] = {}
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens in it recognised, none added."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: list[int]) -> str:
        """The text of a whole sequence, special tokens left out."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text; nothing for special tokens and for padding rows of the vocabulary."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._spell(token)
        return known

    def _spell(self, token: int) -> bytes:
        text = None if token in self.special_ids else self.backend.id_to_token(token)
        if text is None:
            return b""
        if all(character in self._alphabet for character in text):
            return bytes(self._alphabet[character] for character in text)
        return text.encode()

    @cached_property
    def chat(self) -> ChatTemplate:
        """The chat template. Raises ArtifactError when the build has none."""
        path = self._folder / "chat_template.jinja"
        config = _read_json(self._folder / "tokenizer_config.json")
        source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
        if not isinstance(source, str):
            raise ArtifactError(f"{self._folder.parent} has no chat template; use --prompt, "
                                "or build again from a checkpoint with chat_template.jinja")
        return ChatTemplate(source, _special_texts(config))


def _special_texts(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token ... as templates see them."""
    texts = {}
    for name, value in config.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                texts[name] = text
    return texts


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is no JSON ({error}); build again with qcn-compile") from None
    return data if isinstance(data, dict) else {}
