"""What all routes share: the model's tokenizer and template, the parsers, the grammars, the engine's bridge."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qcn_compile.errors import QcnError
from qcn_compile.runtime.engine import Engine
from qcn_compile.runtime.loaded import Model
from qcn_compile.runtime.parsing import OutputParser, make_reasoning_parser, make_tool_parser, tool_parser_name
from qcn_compile.runtime.sampler import Constraint
from qcn_compile.runtime.server.bridge import Bridge, EngineLike
from qcn_compile.runtime.server.config import ServerConfig
from qcn_compile.runtime.server.errors import ApiError, bad_request
from qcn_compile.runtime.server.generation import Generation, Job, Parser
from qcn_compile.runtime.server.grammar import Grammar, GrammarCompiler
from qcn_compile.runtime.server.metrics import Metrics
from qcn_compile.runtime.server.prompts import render
from qcn_compile.runtime.tokenizer import Tokenizer

_LONG_TEXT = 16_000  # characters; longer prompts are encoded off the event loop
_THINK = "<think>"


@dataclass(frozen=True)
class Occupancy:
    """How full the engine is."""

    running: int
    queued: int
    slots: int
    pages_used: int
    pages: int


class Service:
    """One model behind the APIs."""

    def __init__(self, config: ServerConfig, tokenizer: Tokenizer, engine: EngineLike, *, vocab_size: int,
                 context_length: int, sampling: Mapping[str, Any], occupancy: Callable[[], tuple[int, int, int, int]],
                 ) -> None:
        self.config, self.tokenizer, self.sampling = config, tokenizer, dict(sampling)
        self.vocab_size, self.context_length = vocab_size, context_length
        self.metrics = Metrics()
        self._occupancy = occupancy
        self.bridge = Bridge(engine, occupancy()[1], config.max_queued, config.request_timeout, self.metrics.observe)
        self.started = time.time()
        self._speculation = getattr(engine, "speculation", None)
        self.tool_parser = self._choose_tool_parser()
        self.reasoning_parser = self._choose_reasoning_parser()
        eos = tokenizer.defaults.eos_token_ids
        self.grammars = GrammarCompiler(tokenizer.backend.to_str(), vocab_size, eos, tokenizer.backend.token_to_id)
        self._add_gauges()

    @staticmethod
    def of(model: Model, config: ServerConfig, sampling: Mapping[str, Any] | None = None) -> Service:
        """The service of a loaded build. `sampling`: defaults over those of the model."""
        defaults = {**model.defaults.sampling, **(sampling or {})}
        return Service(config, model.tokenizer, model.engine, vocab_size=model.manifest.vocab_size,
                       context_length=model.memory.context_length, sampling=defaults,
                       occupancy=lambda: _engine_occupancy(model.engine))

    def occupancy(self) -> Occupancy:
        """How full the engine is now."""
        slots_used, slots, pages_used, pages = self._occupancy()
        running = min(slots_used, self.bridge.live)
        return Occupancy(running, self.bridge.live - running, slots, pages_used, pages)

    def status(self) -> str:
        """ok, draining or failed."""
        if self.bridge.failure is not None:
            return "failed"
        return "draining" if self.bridge.draining else "ok"

    def check_model(self, name: str | None) -> str:
        """The name an answer carries. Raises 404 for a model that is not served."""
        if name is None:
            return self.config.model_name
        if self.config.accept_any_model or name in self.config.model_names:
            return name
        raise ApiError(404, f"the model {name[:100]!r} is not served here; use {self.config.model_name!r}, or start "
                       "the server with --served-model-name or --accept-any-model", param="model",
                       code="model_not_found")

    async def prompt(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None,
                     variables: Mapping[str, Any], add_generation_prompt: bool = True) -> str:
        """Messages in the model's template."""
        return await self._off_loop(sum(len(str(m.get("content", ""))) for m in messages), lambda: render(
            self.tokenizer.chat, messages, tools, variables, add_generation_prompt))

    async def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return await self._off_loop(len(text), lambda: self.tokenizer.encode(text))

    def check_prompt(self, tokens: Sequence[int], param: str) -> None:
        """Raises 400 for a prompt that cannot run."""
        if not tokens:
            raise bad_request(f"{param}: the prompt is empty; give at least one token", param)
        if len(tokens) >= self.context_length:
            raise ApiError(400, f"{param}: the prompt has {len(tokens)} tokens, the context holds "
                           f"{self.context_length} with at least one new token; shorten it", param=param,
                           code="context_length_exceeded")
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            place, token = next((i, t) for i, t in enumerate(tokens) if not 0 <= t < self.vocab_size)
            raise bad_request(f"{param}: token {token} at position {place} is outside the vocabulary of "
                              f"{self.vocab_size}", param)

    def thinks(self, prompt: str) -> bool:
        """Whether the prompt left a thought open, so that the output starts inside it."""
        return self.reasoning_parser is not None and prompt.rstrip().endswith(_THINK)

    def parser(self, prompt: str, tools: Sequence[dict[str, Any]] | None) -> Callable[[], Parser]:
        """Makes a parser for each answer to a prompt."""
        inside, names = self.thinks(prompt), (self.reasoning_parser, self.tool_parser)

        def make() -> Parser:
            reasoning = None if names[0] is None else make_reasoning_parser(names[0], inside)
            calls = None if names[1] is None or not tools else make_tool_parser(names[1], tools)
            return OutputParser(reasoning, calls)

        return make

    async def constraint(self, grammar: Grammar | None, thinking: bool) -> Callable[[], Constraint] | None:
        """Makes a constraint for each answer."""
        if grammar is None:
            return None
        return await asyncio.to_thread(self.grammars.compile, grammar, thinking)

    def generate(self, job: Job) -> Generation:
        """Start a job. Raises 503 when too many wait."""
        return Generation(self.bridge, job)

    async def _off_loop(self, size: int, work: Callable[[], Any]) -> Any:
        return work() if size < _LONG_TEXT else await asyncio.to_thread(work)

    def _template_text(self) -> str:
        try:
            return self.tokenizer.chat.source
        except QcnError:
            return ""

    def _choose_tool_parser(self) -> str | None:
        name = self.config.tool_call_parser
        if name == "auto":
            text = self._template_text()
            return "qwen3_coder" if "<function=" in text else "hermes" if "<tool_call>" in text else None
        return None if name == "none" else tool_parser_name(name)

    def _choose_reasoning_parser(self) -> str | None:
        name = self.config.reasoning_parser
        if name == "auto":
            return "qwen3" if _THINK in self._template_text() else None
        if name == "none":
            return None
        make_reasoning_parser(name, False)
        return name

    def _add_gauges(self) -> None:
        for name, text, read in (
                ("qcn_requests_running", "Requests that have a slot", lambda: self.occupancy().running),
                ("qcn_requests_queued", "Requests that wait for a slot", lambda: self.occupancy().queued),
                ("qcn_kv_pages_used", "KV pages in use", lambda: self.occupancy().pages_used),
                ("qcn_kv_pages", "KV pages there are", lambda: self.occupancy().pages)):
            self.metrics.gauge(name, text, read)
        if (speculation := self._speculation) is not None:
            self.metrics.count("qcn_draft_tokens", "Tokens drafted", lambda: speculation.drafted)
            self.metrics.count("qcn_accepted_tokens", "Drafted tokens that came true", lambda: speculation.accepted)
        self.metrics.gauge("qcn_kv_usage_ratio", "Share of KV pages in use",
                           lambda: self.occupancy().pages_used / max(1, self.occupancy().pages))


def _engine_occupancy(engine: Engine) -> tuple[int, int, int, int]:
    return engine.slots.total - engine.slots.free, engine.slots.total, engine.pages.used, engine.pages.total
