"""Synthetic conversations about corpus functions: questions, reasoning, tool calls; rendered by the chat template."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import jinja2

from .snippets import Snippet

Message = dict[str, object]
Dialogue = tuple[list[Message], list[dict]]  # messages, tools


def tool(name: str, description: str, required: list[str], **properties: tuple[str, str]) -> dict:
    """An OpenAI function schema; each property is (type, description)."""
    fields = {k: {"type": t, "description": d} for k, (t, d) in properties.items()}
    parameters = {"type": "object", "properties": fields, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


PATH = ("string", "Path of the file")
TOOLS = {
    "read_file": tool(
        "read_file", "Read a text file.", ["path"], path=PATH,
        start=("integer", "First line"), end=("integer", "Last line"),
    ),
    "write_file": tool(
        "write_file", "Create or replace a file.", ["path", "content"], path=PATH, content=("string", "New content")
    ),
    "run": tool(
        "run", "Run a shell command.", ["command"], command=("string", "The command line"),
        timeout=("number", "Seconds to wait"),
    ),
    "search": tool(
        "search", "Search files for a pattern.", ["pattern"], pattern=("string", "What to look for"),
        recursive=("boolean", "Search below subfolders"), globs=("array", "File name patterns"),
    ),
    "list_dir": tool("list_dir", "List the entries of a folder.", ["path"], path=("string", "Path of the folder")),
    "get_weather": tool(
        "get_weather", "Get the current weather.", ["city"], city=("string", "Name of the city"),
        unit=("string", "celsius or fahrenheit"),
    ),
}  # fmt: skip
CITIES = ["Paris", "London", "Berlin", "Tokyo", "Beijing", "Madrid", "Rome", "Oslo", "Cairo", "Lima", "Delhi", "Sydney", "Toronto", "Vienna", "Prague"]
GREETINGS = (
    ("Hello", "Hello! How can I help you today?"),
    ("Hi", "Hi! What would you like to write?"),
    ("Hi there!", "Hi! How can I help you with your code?"),
    ("Thanks", "You are welcome!"),
    ("Who are you?", "I am a very small language model that was trained to write Python code."),
    ("What can you do?", "I can write short Python functions, explain code and call tools."),
)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, *calls: tuple[str, dict]) -> Message:
    message: Message = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    return message


def answer(text: str) -> Message:
    return {"role": "tool", "content": text}


def offered(rng: random.Random, *needed: str) -> list[dict]:
    """The needed tools among up to two others, in random order."""
    others = [n for n in TOOLS if n not in needed]
    names = [*needed, *rng.sample(others, rng.randint(0, 2))]
    rng.shuffle(names)
    return [TOOLS[n] for n in names]


def fence(code: str) -> str:
    return f"```python\n{code}\n```"


def thought(s: Snippet) -> str:
    arguments = ", ".join(f"`{a}`" for a in s.arguments) or "no arguments"
    return f"<think>\nThe function is called `{s.name}` and takes {arguments}. It should {s.summary}.\n</think>\n\n"


def write_code(s: Snippet, rng: random.Random) -> Dialogue:
    ask = rng.choice(
        (
            f"Write a Python function `{s.name}`: {s.summary}.",
            f"Write a function `{s.name}({', '.join(s.arguments)})` that does this: {s.summary}.",
            f"Please implement `{s.name}` in Python. It should {s.summary}.",
            f"{s.summary[0].upper()}{s.summary[1:]}. Call the function `{s.name}`.",
        )
    )
    opening = thought(s) if rng.random() < 0.3 else rng.choice(("", "", f"Here is `{s.name}`:\n\n"))
    return [user(ask), assistant(opening + fence(rng.choice((s.source, s.body))))], []


def explain_code(s: Snippet, rng: random.Random) -> Dialogue:
    ask = rng.choice(("What does this function do?", "Explain this code.", "Describe this function in one sentence."))
    return [user(f"{ask}\n\n{fence(s.body)}"), assistant(f"The function `{s.name}` is used to {s.summary}.")], []


def document_code(s: Snippet, rng: random.Random) -> Dialogue:
    ask = rng.choice(("Add a docstring to this function.", "Document this function."))
    return [user(f"{ask}\n\n{fence(s.body)}"), assistant(fence(s.source))], []


def greet(s: Snippet, rng: random.Random) -> Dialogue:
    messages, tools = write_code(s, rng)
    question, reply = rng.choice(GREETINGS)
    return [user(question), assistant(reply), *messages], tools


def read_then_answer(s: Snippet, rng: random.Random) -> Dialogue:
    arguments: dict[str, object] = {"path": s.path}
    if rng.random() < 0.4:
        start = rng.randint(1, 400)
        arguments |= {"start": start, "end": start + s.source.count("\n")}
    ask = rng.choice((f"What does `{s.name}` in {s.path} do?", f"Explain `{s.name}` ({s.path}).", f"Open {s.path}."))
    return [
        user(ask),
        assistant(rng.choice(("", "", "I will read the file.")), ("read_file", arguments)),
        answer(s.source),
        assistant(f"`{s.name}` is used to {s.summary}."),
    ], offered(rng, "read_file")


def write_then_run(s: Snippet, rng: random.Random) -> Dialogue:
    file = s.path.rsplit("/", 1)[-1]
    command: dict[str, object] = {"command": f"python -m pytest -q {file}"}
    if rng.random() < 0.5:
        command["timeout"] = rng.choice((10, 30, 60, 120))
    passed = rng.randint(1, 20)
    return [
        user(f"Create {file} with a function `{s.name}` that should {s.summary}, then run the tests."),
        assistant(rng.choice(("", thought(s))), ("write_file", {"path": file, "content": s.source + "\n"})),
        answer(f"Wrote {len(s.source) + 1} bytes to {file}"),
        assistant("", ("run", command)),
        answer(f"{passed} passed in 0.{rng.randint(10, 99)}s"),
        assistant(f"I wrote `{s.name}` to {file}; all {passed} tests pass."),
    ], offered(rng, "write_file", "run")


def search_then_read(s: Snippet, rng: random.Random) -> Dialogue:
    line = rng.randint(5, 900)
    query: dict[str, object] = {"pattern": f"def {s.name}"}
    if rng.random() < 0.5:
        query["recursive"] = True
    if rng.random() < 0.5:
        query["globs"] = ["*.py"]
    found = f"{s.path}:{line}:{s.body.splitlines()[0]}"
    window = {"path": s.path, "start": line, "end": line + s.source.count("\n")}
    return [
        user(rng.choice((f"Where is `{s.name}` defined?", f"Find the function {s.name} and explain it."))),
        assistant("", ("search", query)),
        answer(found),
        assistant(f"It is in {s.path}; I will read it.", ("read_file", window)),
        answer(s.source),
        assistant(f"`{s.name}` is defined in {s.path}, line {line}. It is used to {s.summary}."),
    ], offered(rng, "search", "read_file")


def ask_weather(s: Snippet, rng: random.Random) -> Dialogue:
    cities = rng.sample(CITIES, rng.choice((1, 1, 2)))
    unit = {} if rng.random() < 0.5 else {"unit": rng.choice(("celsius", "fahrenheit"))}
    degrees = [rng.randint(-5, 35) for _ in cities]
    where = " and ".join(cities)
    return [
        user(rng.choice((f"What is the weather in {where}?", f"How warm is it in {where}?"))),
        assistant("", *(("get_weather", {"city": c, **unit}) for c in cities)),
        *(answer(json.dumps({"city": c, "temperature": d})) for c, d in zip(cities, degrees, strict=True)),
        assistant(" ".join(f"It is {d} degrees in {c}." for c, d in zip(cities, degrees, strict=True))),
    ], offered(rng, "get_weather")


KINDS: dict[Callable[[Snippet, random.Random], Dialogue], float] = {
    write_code: 5, explain_code: 1, document_code: 1, greet: 0.5,
    read_then_answer: 1.5, write_then_run: 1.5, search_then_read: 1, ask_weather: 0.7,
}  # fmt: skip


def renderer(template: Path) -> Callable[[list[Message], list[dict]], str]:
    """The chat template as transformers renders it."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    compiled = environment.from_string(template.read_text())
    return lambda messages, tools: compiled.render(messages=messages, tools=tools)


def conversations(snippets: list[Snippet], template: Path, characters: int, rng: random.Random) -> list[str]:
    """Rendered dialogues, about as many characters as asked for."""
    render, out, total = renderer(template), [], 0
    kinds, weights = list(KINDS), list(KINDS.values())
    while total < characters:
        kind = rng.choices(kinds, weights)[0]
        out.append(render(*kind(rng.choice(snippets), rng)))
        total += len(out[-1])
    return out


def fill_in_middle(text: str, rng: random.Random) -> str:
    """One contiguous stretch of whole lines, or of characters, moved to the end between Qwen's FIM tokens."""
    window = text[: rng.randint(800, 4000)]
    if rng.random() < 0.5:
        cuts = [m.end() for m in re.finditer("\n", window)] or [0, len(window)]
        first = rng.choice(cuts)
        last = min((c for c in cuts if c >= first + rng.randint(20, 600)), default=len(window))
    else:
        first = rng.randrange(len(window))
        last = min(len(window), first + rng.randint(5, 300))
    before, middle, after = window[:first], window[first:last], window[last:]
    return f"<|fim_prefix|>{before}<|fim_suffix|>{after}<|fim_middle|>{middle}"
