"""Text on a terminal or a pipe: one completion, or a chat with history."""

from __future__ import annotations

import json
import resource
import sys
from contextlib import suppress
from typing import Any

from qcn_compile.errors import CapacityError, UsageError
from qcn_compile.runtime.loaded import Model, Prompt
from qcn_compile.runtime.output import Output, Timing
from qcn_compile.runtime.request import SamplingParams

HELP = "/clear forgets the conversation, /exit leaves"


def complete(model: Model, prompt: Prompt, params: SamplingParams, as_json: bool) -> str:
    """Stream one answer to stdout, then one line of speeds to stderr (or the last JSON object). Returns its text."""
    pieces = []
    stream = model.generate(prompt, params)
    try:
        for output in stream:
            pieces.append(output.text)
            _show(output, as_json)
    finally:
        stream.close()
    timing = output.timing
    assert timing is not None
    if as_json:
        _print_json(summary(output, timing, model.load_seconds))
    else:
        print(flush=True)
        print(speed_line(timing, model.load_seconds), file=sys.stderr, flush=True)
    return "".join(pieces)


def chat(model: Model, params: SamplingParams, as_json: bool) -> None:
    """Read one message a line until /exit or the end of stdin; every answer sees the whole conversation."""
    person = sys.stdin.isatty()
    template = model.tokenizer.chat
    history: list[dict[str, str]] = []
    if person:
        _enable_line_editing()
        print(HELP, file=sys.stderr)
    while (line := _read_line(person)) is not None:
        if line == "/exit":
            return
        if line == "/clear":
            history.clear()
        elif line.startswith("/"):
            print(f"unknown command {line.split()[0]}; {HELP}", file=sys.stderr)
        elif line:
            turn = [*history, {"role": "user", "content": line}]
            answer = _answer(model, model.tokenizer.encode(template.render(turn)), params, as_json, person)
            if answer is not None:
                history = [*turn, {"role": "assistant", "content": answer}]


def _answer(model: Model, prompt: list[int], params: SamplingParams, as_json: bool, person: bool) -> str | None:
    """One answer; None when it was interrupted or the conversation is too long, which a person may go on from."""
    try:
        return complete(model, prompt, params, as_json)
    except KeyboardInterrupt:
        if not person:
            raise
        print("\n(interrupted; this turn is forgotten)", file=sys.stderr)
    except CapacityError as error:
        if not person:
            raise
        print(f"{error}; /clear starts afresh", file=sys.stderr)
    return None


def _read_line(person: bool) -> str | None:
    """The next message without surrounding space, None at the end."""
    if person:
        try:
            return input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None


def _enable_line_editing() -> None:
    with suppress(ImportError):  # a Python without readline: plain input
        import readline  # noqa: F401  # importing it gives input() editing and history


def _show(output: Output, as_json: bool) -> None:
    if as_json:
        _print_json({"text": output.text, "token_ids": list(output.token_ids)})
    elif output.text:
        try:
            sys.stdout.write(output.text)
        except UnicodeEncodeError as error:
            raise UsageError(f"this terminal's encoding ({error.encoding}) cannot show the text; "
                             "set PYTHONIOENCODING=utf-8") from None
        sys.stdout.flush()


def _print_json(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def summary(output: Output, timing: Timing, load_seconds: float) -> dict[str, Any]:
    """The last JSON object: why it ended, token counts as in the OpenAI API, times and rates."""
    assert output.finish_reason is not None
    return {"done": True, "finish_reason": output.finish_reason.value,
            "usage": {"prompt_tokens": timing.prompt_tokens, "completion_tokens": timing.new_tokens,
                      "total_tokens": timing.prompt_tokens + timing.new_tokens},
            "timing": {"load_ms": 1e3 * load_seconds, "first_token_ms": 1e3 * timing.first_token,
                       "prefill_tokens_per_second": timing.prefill_rate,
                       "decode_tokens_per_second": timing.decode_rate},
            "peak_rss_bytes": peak_rss()}


def speed_line(timing: Timing, load_seconds: float) -> str:
    """The one line after an answer."""
    decode = f"{timing.decode_rate:.1f} tok/s" if timing.decode_rate else "-"
    return (f"prompt {timing.prompt_tokens} tokens, {timing.prefill_rate:.1f} tok/s | new {timing.new_tokens} tokens, "
            f"{decode} | first token {1e3 * timing.first_token:.1f} ms | load {1e3 * load_seconds:.0f} ms | "
            f"peak {peak_rss() / 1e6:.0f} MB")


def peak_rss() -> int:
    """Most memory this process ever had resident, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
