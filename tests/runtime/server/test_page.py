"""The pages in a headless Chromium: chat with streaming, reasoning and tool calls, live state, offline docs."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import socket
import subprocess
import time

import httpx
import pytest

from qcn_compile import cli
from qcn_compile.runtime.cli import parser as run_parser
from qcn_compile.runtime.server.launch import server_config
from qcn_compile.runtime.server.sglang import check_sglang_flags
from qcn_compile.runtime.speculation.options import speculation_options

pytestmark = pytest.mark.skipif(not shutil.which("chromedriver"), reason="no chromedriver")
TOOLS = '[{"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}]'
MODELS = {"instruct": "Qwen/Qwen3-Coder-Next", "thinking": "Qwen/Qwen3-Next-80B-A3B-Thinking"}
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
OPTIONS = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]}


class Browser:
    """The few WebDriver commands that are needed."""

    def __init__(self, port):
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": OPTIONS,
                                                   "goog:loggingPrefs": {"browser": "ALL"}}}}
        self._session = f"/session/{self._post('/session', wanted)['sessionId']}"

    def _post(self, path, body):
        reply = self._http.post(path, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()["value"]

    def open(self, url):
        self._post(f"{self._session}/url", {"url": url})

    def run(self, script):
        return self._post(f"{self._session}/execute/sync", {"script": script, "args": []})

    def keys(self, selector, text):
        found = self._post(f"{self._session}/element", {"using": "css selector", "value": selector})
        self._post(f"{self._session}/element/{found[ELEMENT]}/value", {"text": text})

    def until(self, script):
        end = time.monotonic() + 15
        while not (value := self.run(f"return {script}")):
            assert time.monotonic() < end, (script, self.run("return document.body.innerText"))
            time.sleep(0.05)
        return value

    def errors(self):
        entries = self._post(f"{self._session}/se/log", {"type": "browser"})
        return [entry for entry in entries if "favicon" not in entry["message"]]

    def quit(self):
        self._http.delete(self._session)


@pytest.fixture(scope="module")
def browser():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/status")
                break
            except httpx.ConnectError:
                time.sleep(0.05)
        driver = Browser(port)
        yield driver
        driver.quit()
    finally:
        process.terminate()
        process.wait(10)


def test_chat(serve, browser, thinking_tokenizer):
    call = '<tool_call>\n{"name": "read", "arguments": {"path": "a.py"}}\n</tool_call>'
    answers = [f"Let me look.\n</think>\n\nReading <b>it</b>.\n{call}", "done\n</think>\n\nIt has one line."]
    server = serve(lambda prompt, params: answers.pop(0), tokens=thinking_tokenizer, delay=0.01)
    browser.open(server.url + "/")
    browser.until("document.querySelector('#model').textContent === 'tiny'")
    browser.run(f"document.querySelector('#tools').value = {TOOLS!r}; return 0")
    browser.keys("#input", "What is in a.py?\ue007")
    browser.until("document.querySelector('#log .call textarea')")
    assert browser.run("return document.querySelector('.user .text').textContent") == "What is in a.py?"
    assert browser.run("return document.querySelector('.reasoning').textContent") == "Let me look."
    assert browser.run("return document.querySelector('.assistant .text').textContent").strip() == "Reading <b>it</b>."
    assert browser.run("return document.querySelector('.call').innerText").startswith("read\n")
    browser.keys(".call textarea", "one line\ue007")
    browser.until("[...document.querySelectorAll('.assistant .text')].at(-1).textContent === 'It has one line.'")
    assert len(server.engine.seen) == 2
    assert "one line" in server.service.tokenizer.decode(server.engine.seen[1][0])
    browser.until("document.querySelector('#rate').textContent > 0")
    assert browser.run("return document.querySelector('#running').textContent").endswith("/ 8")
    assert browser.errors() == []


def test_stop_and_errors(serve, browser):
    server = serve("word " * 500, delay=0.02)
    browser.open(server.url + "/")
    browser.keys("#input", "go\ue007")
    browser.until("document.querySelector('.assistant .text')?.textContent.length > 5")
    browser.run("document.querySelector('#stop').click(); return 0")
    browser.until("document.querySelector('.assistant').innerText.includes('stopped')")
    end = time.monotonic() + 5
    while server.engine.unfinished:
        assert time.monotonic() < end
        time.sleep(0.01)
    browser.run("document.querySelector('#limit').value = -5; return 0")
    browser.run("document.querySelector('#input').value = 'again'; return 0")
    browser.run("const form = document.querySelector('#form'); form.noValidate = true; form.requestSubmit(); return 0")
    assert "max_tokens" in browser.until("document.querySelector('.error')?.textContent")
    assert "400" in browser.errors()[0]["message"]


def test_docs(serve, browser):
    server = serve()
    browser.open(server.url + "/docs")
    assert browser.until("document.querySelectorAll('details').length") > 10
    assert browser.run("return document.querySelector('details table').textContent").count("messages")
    assert browser.errors() == []


def select(browser, **choices):
    for name, value in choices.items():
        browser.run(f"const box = document.querySelector('#{name}'); box.value = {json.dumps(value)}; "
                    "box.dispatchEvent(new Event('change', {bubbles: true})); return 0")
    texts = browser.run("return ['verdict', 'numbers', 'notes', 'compile', 'run'].map("
                        "id => document.getElementById(id).innerText)")
    return dict(zip(("verdict", "numbers", "notes", "compile", "run"), texts, strict=True))


def flags_of(command, program):
    words = shlex.split(command, comments=True)
    assert words[0] == program
    return words[1:]


def test_configurator_shows_the_planners_verdict(serve, browser, capsys):
    browser.open(serve().url + "/")
    browser.run("document.querySelector('a[href=configure]').click(); return 0")
    browser.until("document.querySelector('#compile')?.textContent")
    shown = select(browser, target="h100-80", quant="fp8", context="32768", gpus="1")
    assert cli.main([*flags_of(shown["compile"], "qcn-compile"), "--gpus", "1", "--plan-only", "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert shown["verdict"] == "Fits on 1 × h100-80"
    assert f"{verdict['speed']['ms_per_token']} ms, bound by {verdict['speed']['bound']}" in shown["numbers"]
    assert f"{verdict['memory']['weights'] / 1e9:.2f} GB weights" in shown["numbers"]
    shown = select(browser, quant="none")
    assert "weights 159.4 GB a chip" in shown["verdict"] and shown["numbers"] == ""
    shown = select(browser, gpus="")
    assert shown["verdict"].startswith("Fits on ") and "Only planned" in shown["notes"]
    assert "MTP" in select(browser, speculation="mtp")["notes"]
    assert browser.errors() == []


def test_configured_commands_are_commands(serve, browser):
    """Every choice of model, tools and speculation on some hardware: our own parsers take the lines."""
    browser.open(serve().url + "/configure")
    browser.until("document.querySelector('#compile')?.textContent")
    for target, thinking, tools, speculation in itertools.product(
            ("h100-80", "b200", "mi300x"), ("instruct", "thinking"), ("on", "off"), ("off", "ngram", "mtp")):
        shown = select(browser, target=target, thinking=thinking, tools=tools, speculation=speculation)
        compiled = cli.parser().parse_args(flags_of(shown["compile"], "qcn-compile"))
        assert compiled.target == target
        assert compiled.model == MODELS[thinking]
        arguments = run_parser().parse_args(flags_of(shown["run"], "qcn-run"))
        check_sglang_flags(arguments)
        config = server_config(arguments)
        assert config.reasoning_parser == ("qwen3" if thinking == "thinking" else "auto")
        assert (config.tool_call_parser == "none") == (tools == "off")
        assert (speculation_options(arguments) is None) == (speculation == "off")
    assert browser.errors() == []
