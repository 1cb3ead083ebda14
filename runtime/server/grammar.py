"""Grammars over the output: JSON schemas, regular expressions, Lark, and tool calls, through llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qcn_compile.runtime.sampler import Constraint
from qcn_compile.runtime.server.config import Limits
from qcn_compile.runtime.server.errors import ApiError, bad_request

if TYPE_CHECKING:
    import llguidance

_WHITESPACE = r"[ \n\r\t]{0,40}"  # bounded, so that a weak model cannot pad for ever


@dataclass(frozen=True)
class Grammar:
    """What the answer must look like: the right side of a Lark rule, and the rules it names. `param` asked for it."""

    answer: str
    param: str
    rules: str = ""


class GrammarCompiler:
    """Grammars for one tokenizer. Raises ApiError 400 for a grammar that cannot work, or without llguidance."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos: Iterable[int],
                 token_id: Callable[[str], int | None]) -> None:
        self._json, self._vocab_size, self._eos = tokenizer_json, vocab_size, sorted(eos)
        self._token_id = token_id
        self._tokenizer: llguidance.LLTokenizer | None = None

    def tag(self, text: str) -> str:
        """A tag of the model's formats in Lark: the token, or else its letters."""
        return text if self._token_id(text) is not None else quoted(text)

    def compile(self, grammar: Grammar, thinking: bool) -> Callable[[], Constraint]:
        """Makes a fresh constraint each time. `thinking`: the output starts inside <think>, which stays free."""
        import llguidance

        start = "start: answer\n"
        if thinking:
            start = f"start: THOUGHT {self.tag('</think>')} /\\s{{0,4}}/ answer\nTHOUGHT: /(.|\\n)*/\n"
        text = llguidance.LLMatcher.grammar_from_lark(f"{start}answer: {grammar.answer}\n{grammar.rules}")
        tokenizer = self._backend(grammar.param)
        matcher = llguidance.LLMatcher(tokenizer, text, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().strip().splitlines()[0][:300]
            raise bad_request(f"{grammar.param}: {reason}", grammar.param, "invalid_grammar")
        return lambda: GrammarConstraint(matcher.deep_copy(), self._vocab_size, tokenizer.vocab_size, self._eos)

    def _backend(self, param: str) -> llguidance.LLTokenizer:
        import llguidance

        if self._tokenizer is None:
            if not self._eos:
                raise bad_request(f"{param}: the build names no end token, so no grammar can end", param)
            self._tokenizer = llguidance.LLTokenizer(self._json, eos_token=self._eos)
        return self._tokenizer


class GrammarConstraint:
    """One answer's place in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, known: int, eos: list[int]) -> None:
        self._matcher, self._eos = matcher, eos
        self._words = np.zeros(-(-known // 32), np.int32)
        self._allowed = np.zeros(vocab_size, bool)

    def allowed(self) -> np.ndarray:
        """bool [vocab]; only end tokens when the grammar is complete, or has grown too complex to go on."""
        allowed = self._allowed
        allowed[:] = False
        if not self._matcher.is_stopped():
            self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
            bits = np.unpackbits(self._words.view(np.uint8), bitorder="little")[:len(allowed)]
            allowed[:len(bits)] = bits
        if not allowed.any():
            allowed[self._eos] = True
        return allowed

    def accept(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


def available() -> bool:
    """Whether llguidance is installed."""
    import importlib.util

    return importlib.util.find_spec("llguidance") is not None


def require(param: str) -> None:
    """Raises ApiError 400 when there is no llguidance."""
    if not available():
        raise ApiError(400, f"{param}: this server runs without grammars; install llguidance", param=param,
                       code="unsupported_value")


def quoted(text: str) -> str:
    """A Lark string."""
    return json.dumps(text)


def json_rule(schema: Any) -> str:
    """A schema inside a Lark rule."""
    options = {"whitespace_flexible": True, "whitespace_pattern": _WHITESPACE}
    return "%json " + json.dumps({**schema, "x-guidance": options} if isinstance(schema, dict) else schema)


def json_grammar(schema: Any, limits: Limits, param: str) -> Grammar:
    """One JSON value of a schema."""
    require(param)
    check_schema(schema, limits, param)
    return Grammar(json_rule(schema), param)


def regex_grammar(pattern: str, limits: Limits, param: str) -> Grammar:
    """Text that a regular expression matches in whole."""
    require(param)
    if not 0 < len(pattern) <= limits.schema_bytes:
        raise bad_request(f"{param}: must have 1 to {limits.schema_bytes} characters", param)
    import llguidance

    try:
        return Grammar(f"/{llguidance.regex_to_lark(pattern, '')}/", param)
    except ValueError as error:
        raise bad_request(f"{param}: {error}", param, "invalid_grammar") from None


def lark_grammar(text: str, limits: Limits, param: str) -> Grammar:
    """A user's own Lark grammar with its rule `start`."""
    require(param)
    if not 0 < len(text.encode()) <= limits.schema_bytes:
        raise bad_request(f"{param}: must have 1 to {limits.schema_bytes} bytes", param)
    return Grammar(f"%lark {{\n{text}\n}}", param)


def check_schema(schema: Any, limits: Limits, param: str) -> None:
    """Raises ApiError 400 for a schema that is too large or nested too deep."""
    if depth(schema) > limits.schema_depth:
        raise bad_request(f"{param}: nested deeper than {limits.schema_depth}", param)
    size = len(json.dumps(schema))
    if size > limits.schema_bytes:
        raise bad_request(f"{param}: {size} bytes, at most {limits.schema_bytes}", param)


def depth(value: Any) -> int:
    """Levels of nesting, counted without recursion."""
    deepest, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
        deepest += 1
    return deepest
