"""Servers to talk to: over an engine that says what it is told, and over the bundled model compiled for this CPU."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import httpx
import pytest
from fake_engine import FakeEngine
from serving import LiveServer, write_tokenizer

from qcn_compile.runtime.loaded import load
from qcn_compile.runtime.server.config import ServerConfig
from qcn_compile.runtime.server.service import Service

THINKING = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "<|im_start|>assistant\n{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
            "{# <tool_call>{\"name\" #}")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The bundled model's tokenizer with its own template."""
    return write_tokenizer(tmp_path_factory.mktemp("coder"))


@pytest.fixture(scope="session")
def thinking_tokenizer(tmp_path_factory):
    """The same with a template that opens a thought."""
    return write_tokenizer(tmp_path_factory.mktemp("thinking"), THINKING)


@pytest.fixture
def serve(tokenizer):
    """serve(reply, **config) -> LiveServer whose engine answers `reply` (a text, or a function of prompt, params)."""
    with contextlib.ExitStack() as stack:
        def start(reply="ok", *, tokens=tokenizer, context_length=4096, slots=8, delay=0.0, fail_at=None, **config):
            answer = reply if callable(reply) else lambda prompt, params: reply
            engine = FakeEngine(tokens, answer, slots, delay, fail_at)
            service = Service(ServerConfig(("tiny",), **config), tokens, engine, vocab_size=4096, sampling={},
                              context_length=context_length, occupancy=engine.occupancy)
            server = stack.enter_context(LiveServer(service))
            server.engine = engine
            return server
        yield start


@pytest.fixture
def post():
    """post(server, path, body, **headers) -> httpx.Response."""
    with httpx.Client(timeout=30) as client:
        def send(server, path, body, **headers):
            url = server if isinstance(server, str) else server.url
            return client.post(url + path, json=body, headers=headers)
        yield send


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """The bundled model, compiled for this CPU."""
    pytest.importorskip("torch")
    pytest.importorskip("tvm")
    folder = tmp_path_factory.mktemp("real") / "build"
    flags = ["--target", "cpu", "-o", str(folder), "--context-length", "4096"]
    done = subprocess.run([sys.executable, "-m", "qcn_compile.cli", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def real(build):
    """A server in this process over the bundled model; `model` is there to look at."""
    with load(build, threads=1, context_length=1536, max_running_requests=64) as model:
        service = Service.of(model, ServerConfig(("tiny",), accept_any_model=True))
        with LiveServer(service) as server:
            server.model = model
            yield server
        model.check_integrity()
