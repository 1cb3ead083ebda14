"""/v1/chat/completions with OpenAI's client: what comes back, streamed and not, and what the model gets to see."""

from __future__ import annotations

import json

import pytest
from openai import OpenAI
from serving import write_tokenizer

CALL = ("Let me look.\n<tool_call>\n<function=read>\n<parameter=path>\nsrc/a.py\n</parameter>\n<parameter=lines>\n12\n"
        "</parameter>\n</function>\n</tool_call>")
TWO_CALLS = CALL + CALL.removeprefix("Let me look.").replace("a.py", "b.py")
TOOLS = [{"type": "function", "function": {
    "name": "read", "description": "Read a file", "parameters": {
        "type": "object", "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}},
        "required": ["path"]}}}]
HELLO = [{"role": "user", "content": "hello"}]


def client(server, key="EMPTY"):
    return OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)


def ask(server, messages=HELLO, **fields):
    return client(server).chat.completions.create(model="tiny", messages=messages, **fields)


def streamed(server, messages=HELLO, **fields):
    """The chunks of a stream added up, per choice."""
    choices = {}
    for chunk in ask(server, messages, stream=True, **fields):
        for choice in chunk.choices:
            whole = choices.setdefault(choice.index, {"content": "", "reasoning_content": "", "calls": {}})
            delta = choice.delta
            whole["content"] += delta.content or ""
            whole["reasoning_content"] += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or []:
                into = whole["calls"].setdefault(call.index, {"arguments": ""})
                if call.function.name:
                    into |= {"name": call.function.name, "id": call.id}
                into["arguments"] += call.function.arguments or ""
            whole["finish_reason"] = choice.finish_reason
    return choices


def prompt_of(server, place=-1):
    tokens = server.engine.seen[place][0]
    return server.service.tokenizer.backend.decode(tokens, skip_special_tokens=False)


def test_an_answer(serve):
    server = serve("Bonjour, 你好 🙂!")
    reply = ask(server)
    assert reply.choices[0].message.content == "Bonjour, 你好 🙂!" and reply.choices[0].finish_reason == "stop"
    assert reply.object == "chat.completion" and reply.model == "tiny" and reply.id.startswith("chatcmpl-")
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 0 and usage.completion_tokens_details.reasoning_tokens == 0
    whole = streamed(server)[0]
    assert whole["content"] == "Bonjour, 你好 🙂!" and whole["finish_reason"] == "stop"


def test_usage_comes_last_in_a_stream(serve):
    server = serve("one two three")
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None for chunk in ask(server, stream=True))


@pytest.mark.parametrize(("text", "count"), [(CALL, 1), (TWO_CALLS, 2), (CALL[:-25], 1)])
def test_tool_calls_streamed_equal_unstreamed(serve, text, count):
    server = serve(text)
    choice = ask(server, tools=TOOLS).choices[0]
    calls = choice.message.tool_calls
    assert len(calls) == count and choice.finish_reason == "tool_calls"
    assert json.loads(calls[0].function.arguments) == {"path": "src/a.py", "lines": 12}
    whole = streamed(server, tools=TOOLS)[0]
    assert whole["finish_reason"] == "tool_calls"
    assert (whole["content"] or None) == choice.message.content
    assert [(c["name"], c["arguments"]) for c in whole["calls"].values()] == [
        (c.function.name, c.function.arguments) for c in calls]
    assert all(call["id"].startswith("call_") for call in whole["calls"].values())


def test_no_tools_no_calls(serve):
    server = serve(CALL)
    assert ask(server).choices[0].message.content == CALL
    reply = ask(server, tools=TOOLS, tool_choice="none").choices[0]
    assert reply.message.content == CALL and reply.message.tool_calls is None
    assert "# Tools" not in prompt_of(server)
    ask(server, tools=TOOLS, tool_choice="auto")
    assert "# Tools" in prompt_of(server)


def test_one_call_at_a_time(serve):
    server = serve(TWO_CALLS)
    reply = ask(server, tools=TOOLS, parallel_tool_calls=False).choices[0]
    assert len(reply.message.tool_calls) == 1 and reply.finish_reason == "tool_calls"
    whole = streamed(server, tools=TOOLS, parallel_tool_calls=False)[0]
    assert len(whole["calls"]) == 1 and whole["finish_reason"] == "tool_calls"
    assert server.engine.unfinished == 0


def test_reasoning_and_tools_together(serve, thinking_tokenizer):
    text = ('I should read it.\n</think>\n\nReading.\n<tool_call>\n{"name": "read", "arguments": {"path": "a"}}\n'
            "</tool_call>")
    server = serve(text, tokens=thinking_tokenizer)
    assert server.service.tool_parser == "hermes"
    reply = ask(server, tools=TOOLS)
    message = reply.choices[0].message
    assert message.reasoning_content == "I should read it." and message.content == "Reading.\n"
    assert json.loads(message.tool_calls[0].function.arguments) == {"path": "a"}
    thought = len(thinking_tokenizer.encode("I should read it."))
    assert thought <= reply.usage.completion_tokens_details.reasoning_tokens <= thought + 4
    whole = streamed(server, tools=TOOLS)[0]
    assert (whole["reasoning_content"], whole["content"]) == ("I should read it.", "Reading.\n")
    assert prompt_of(server).endswith("<think>\n")


@pytest.mark.parametrize("switch", [{"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False},
                                    {"reasoning_effort": "none"}])
def test_thinking_is_switched_off(serve, thinking_tokenizer, switch):
    server = serve("plain", tokens=thinking_tokenizer)
    reply = ask(server, extra_body=switch)
    assert reply.choices[0].message.content == "plain" and not prompt_of(server).endswith("<think>\n")
    assert reply.usage.completion_tokens_details.reasoning_tokens == 0


def test_an_unfinished_thought_is_all_reasoning(serve, thinking_tokenizer):
    server = serve("hm, let me see", tokens=thinking_tokenizer)
    reply = ask(server)
    assert reply.choices[0].message.reasoning_content == "hm, let me see" and not reply.choices[0].message.content
    assert reply.usage.completion_tokens_details.reasoning_tokens == reply.usage.completion_tokens


def test_several_answers_have_seeds_of_their_own(serve):
    server = serve(lambda prompt, params: f"seed {params.seed}")
    reply = ask(server, n=3, seed=7)
    assert [c.message.content for c in reply.choices] == ["seed 7", "seed 8", "seed 9"]
    assert {i: c["content"] for i, c in streamed(server, n=3, seed=7).items()} == {
        0: "seed 7", 1: "seed 8", 2: "seed 9"}


def test_sampling_fields_reach_the_engine(serve):
    server = serve()
    ask(server, temperature=0.3, top_p=0.0, seed=-1, frequency_penalty=0.5, presence_penalty=-0.5, max_tokens=9,
        max_completion_tokens=7, logit_bias={"5": 2}, stop=["x", "y"],
        extra_body={"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.2, "stop_token_ids": [3], "ignore_eos": True})
    params = server.engine.seen[-1][1]
    assert (params.temperature, params.top_p, params.seed, params.max_tokens) == (0.3, 1e-6, 2**64 - 1, 7)
    assert (params.frequency_penalty, params.presence_penalty, params.min_p) == (0.5, -0.5, 0.1)
    assert (params.top_k, params.repetition_penalty, params.logit_bias) == (0, 1.2, {5: 2.0})
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (("x", "y"), (3,), True)
    ask(server, stop="z")
    assert server.engine.seen[-1][1].stop == ("z",)


def test_stop_and_length(serve):
    server = serve("one two three four")
    assert ask(server, stop="three").choices[0].message.content == "one two "
    assert ask(server, stop="three", extra_body={"include_stop_str_in_output": True}).choices[0].message.content == (
        "one two three")
    assert ask(server, max_tokens=2).choices[0].finish_reason == "length"
    assert streamed(server, max_tokens=2)[0]["finish_reason"] == "length"


def test_logprobs(serve):
    server = serve("naïve")
    tokens = ask(server, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert bytes(b for t in tokens[:-1] for b in t.bytes).decode() == "naïve" and tokens[-1].token == "<|endoftext|>"
    assert all(t.logprob == -0.5 and len(t.top_logprobs) == 1 for t in tokens)
    chunks = [c.choices[0].logprobs for c in ask(server, logprobs=True, stream=True) if c.choices]
    assert sum(len(c.content) for c in chunks if c is not None) == len(tokens)


def test_roles_and_parts_as_the_template_needs_them(serve):
    server = serve()
    ask(server, [{"role": "system", "content": "A"}, {"role": "developer", "content": [{"type": "text", "text": "B"}]},
                 {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}])
    assert prompt_of(server) == ("<|im_start|>system\nA\n\nB<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
                                 "<|im_start|>assistant\n")


def test_a_late_system_message_moves_when_the_template_refuses_it(serve, tmp_path):
    strict = ("{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
              "{{ raise_exception('system first') }}{% endif %}[{{ m.role }}:{{ m.content }}]{% endfor %}")
    server = serve(tokens=write_tokenizer(tmp_path, strict))
    ask(server, [{"role": "user", "content": "u"}, {"role": "system", "content": "late"}])
    assert prompt_of(server) == "[system:late][user:u]"


def test_history_with_tool_calls(serve):
    server = serve()
    call = {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"path": "x", "lines": 2}'}}
    empty = {"id": "call_2", "type": "function", "function": {"name": "list", "arguments": ""}}
    ask(server, [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call, empty]},
                 {"role": "tool", "tool_call_id": "call_1", "content": "data"},
                 {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "none"}]}],
        tools=TOOLS)
    seen = prompt_of(server)
    assert "<function=read>\n<parameter=path>\nx\n</parameter>\n<parameter=lines>\n2\n</parameter>" in seen
    assert "<function=list>\n</function>" in seen and "<tool_response>\ndata\n</tool_response>" in seen
