"""/v1/completions: text in, text out; fill in the middle with `suffix`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qcn_compile.runtime.parsing.events import Content
from qcn_compile.runtime.sampler import Sample
from qcn_compile.runtime.server.chat_job import content_grammar
from qcn_compile.runtime.server.endpoint import Endpoint, read
from qcn_compile.runtime.server.errors import ApiError, bad_request, unsupported
from qcn_compile.runtime.server.generation import Generation, Job
from qcn_compile.runtime.server.replies import new_id, now, token_text, usage_reply
from qcn_compile.runtime.server.sampling import sampling_params
from qcn_compile.runtime.server.schema.completions import CompletionReply, CompletionRequest
from qcn_compile.runtime.server.service import Service
from qcn_compile.runtime.server.sse import DONE, EventStream, TextEvent, event, while_connected

DEFAULT_TOKENS = 16  # as OpenAI's
_FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


async def completions(service: Service, request: Request) -> Response:
    """Continue a text."""
    body = await read(service, request, CompletionRequest)
    model = service.check_model(body.model)
    job = await completion_job(service, body)
    echoes = [_echo(service, body, prompt) for prompt in job.prompts for _ in range(job.choices)]
    generation = service.generate(job)
    if body.stream:
        return EventStream(_events(service, body, model, generation, echoes), generation.close)
    answers = await while_connected(request, generation.answers(), generation.close)
    service.metrics.add_cached(generation.usage.cached)
    choices = [_choice(service, place, echoes[place] + answer.content, answer.finish_reason,
                       answer.samples if body.logprobs is not None else None) for place, answer in enumerate(answers)]
    return JSONResponse({**_head(model), "choices": choices, "usage": usage_reply(generation.usage)})


async def completion_job(service: Service, body: CompletionRequest) -> Job:
    """The job. Raises ApiError for what cannot be done."""
    if body.echo and body.logprobs is not None:
        raise unsupported("echo with logprobs: the prompt's own log probabilities are not computed", "logprobs")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise unsupported("best_of: must equal n", "best_of")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options: only with stream true", "stream_options")
    prompts = await _prompts(service, body)
    for place, prompt in enumerate(prompts):
        service.check_prompt(prompt, "prompt" if len(prompts) == 1 else f"prompt[{place}]")
    limit = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    params = sampling_params(body, service.sampling, service.vocab_size, service.config.limits, limit, body.logprobs)
    grammar = content_grammar(service, body.response_format, body)
    if grammar is not None and params.ignore_eos:
        raise bad_request("ignore_eos: cannot go together with a grammar, which ends the answer", "ignore_eos")
    return Job(prompts, params, body.n or 1, constraint=await service.constraint(grammar, False))


async def _prompts(service: Service, body: CompletionRequest) -> list[list[int]]:
    given = body.prompt
    if isinstance(given, str):
        several: Sequence[str | list[int]] = [given]
    elif given and isinstance(given[0], int):
        several = [given]
    else:
        several = given  # type: ignore[assignment]
    if not 0 < len(several) <= service.config.limits.prompts:
        raise bad_request(f"prompt: give 1 to {service.config.limits.prompts} prompts", "prompt")
    prompts = [list(p) if not isinstance(p, str) else await service.encode(p) for p in several]
    if body.suffix:
        return [await _fill_in(service, prompt, body.suffix) for prompt in prompts]
    return prompts


async def _fill_in(service: Service, prefix: list[int], suffix: str) -> list[int]:
    """The prompt that asks for what lies between."""
    before, after, middle = (service.tokenizer.backend.token_to_id(name) for name in _FIM)
    if before is None or after is None or middle is None:
        raise unsupported(f"suffix: this model's tokenizer has no {_FIM[0]}", "suffix")
    return [before, *prefix, after, *await service.encode(suffix), middle]


def _echo(service: Service, body: CompletionRequest, prompt: Sequence[int]) -> str:
    if not body.echo:
        return ""
    return body.prompt if isinstance(body.prompt, str) else service.tokenizer.decode(list(prompt))


def _head(model: str) -> dict[str, Any]:
    return {"id": new_id("cmpl-"), "object": "text_completion", "created": now(), "model": model}


def _choice(service: Service, index: int, text: str, finish_reason: str | None, samples: Sequence[Sample] | None,
            offset: int = 0) -> dict[str, Any]:
    logprobs = None if samples is None else _logprobs(service, samples, offset)
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _logprobs(service: Service, samples: Sequence[Sample], offset: int) -> dict[str, Any]:
    texts = [token_text(service.tokenizer, sample.token)[0] for sample in samples]
    offsets = [offset + sum(map(len, texts[:place])) for place in range(len(texts))]
    top = [{token_text(service.tokenizer, token)[0]: value for token, value in sample.top_logprobs}
           for sample in samples]
    return {"tokens": texts, "token_logprobs": [max(sample.logprob or 0.0, -9999.0) for sample in samples],
            "top_logprobs": top, "text_offset": offsets}


async def _events(service: Service, body: CompletionRequest, model: str, generation: Generation,
                  echoes: Sequence[str]) -> AsyncIterator[bytes]:
    head = _head(model)
    usage = {"usage": None} if body.stream_options is not None and body.stream_options.include_usage else {}
    offsets = [len(echo) for echo in echoes]
    plain = [TextEvent({**head, "choices": [_choice(service, index, TextEvent.TEXT, None, None)], **usage})
             for index in range(len(echoes))]
    for index, echo in enumerate(echoes):
        if echo:
            yield event({**head, "choices": [_choice(service, index, echo, None, None)], **usage})
    try:
        async for delta in generation.deltas():
            text = "".join(item.text for item in delta.events if isinstance(item, Content))
            if not text and delta.finish_reason is None and body.logprobs is None:
                continue
            if delta.finish_reason is None and body.logprobs is None:
                yield plain[delta.index](text)
                continue
            samples = delta.samples if body.logprobs is not None else None
            choice = _choice(service, delta.index, text, delta.finish_reason, samples, offsets[delta.index])
            offsets[delta.index] += len(text)
            yield event({**head, "choices": [choice], **usage})
    except ApiError as error:
        yield event(error.openai())
        yield DONE
        return
    service.metrics.add_cached(generation.usage.cached)
    if usage:
        yield event({**head, "choices": [], "usage": usage_reply(generation.usage)})
    yield DONE


ENDPOINTS = (Endpoint("POST", "/v1/completions", completions, "Continue a text", CompletionRequest, CompletionReply,
                      streams=True),)
