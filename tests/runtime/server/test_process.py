"""qcn-run --port as a process: start, signals, flags, failures."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

COMMAND = [sys.executable, "-m", "qcn_compile.runtime.cli"]


@contextlib.contextmanager
def running(build, *flags, env=None):
    """A server process and its address."""
    process = subprocess.Popen([*COMMAND, str(build), *flags, "--threads", "1", "--port", "0"], stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, env=env)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"at (https?://[^ ]+)", line):
            break
    else:
        raise AssertionError("".join(lines))
    try:
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def body(**fields):
    return {"messages": [{"role": "user", "content": "hi"}], "ignore_eos": True, "max_tokens": 20, **fields}


def ended(process, code, seconds=10):
    assert process.wait(seconds) == code


def test_serves_and_ends_on_sigterm(toy_build):
    with running(toy_build, "--served-model-name", "toy", "--served-model-name", "also") as (process, url):
        assert httpx.get(url + "/health").status_code == 200
        assert [m["id"] for m in httpx.get(url + "/v1/models").json()["data"]] == ["toy", "also"]
        assert httpx.post(url + "/v1/chat/completions", json=body()).json()["usage"]["completion_tokens"] == 20
        process.send_signal(signal.SIGTERM)
        ended(process, 0)
        rest = process.stderr.read()
        assert "hi" not in rest.split() and "Traceback" not in rest


def test_names_of_sglang_and_defaults(toy_build):
    flags = ["--chunked-prefill-size", "-1", "--mem-fraction-static", "0.5", "--max-running-requests", "3",
             "--temperature", "0", "--context-length", "100", "--tool-call-parser", "qwen_coder", "--reasoning-parser",
             "qwen3"]
    with running(toy_build, *flags) as (_, url):
        assert httpx.get(url + "/state").json()["slots"] == 3
        assert httpx.get(url + "/v1/models").json()["data"][0]["max_model_len"] == 100
        texts = {httpx.post(url + "/v1/chat/completions", json=body()).text.partition("choices")[2] for _ in range(3)}
        assert len(texts) == 1


def test_sigterm_lets_a_stream_end(toy_build):
    with running(toy_build) as (process, url), httpx.stream(
            "POST", url + "/v1/chat/completions", json=body(stream=True, max_tokens=100)) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        ended(process, 0)


def test_a_second_signal_ends_at_once(toy_build):
    with running(toy_build, "--max-running-requests", "1") as (process, url):
        address = url.removeprefix("http://").split(":")
        held = socket.create_connection((address[0], int(address[1])))
        data = json.dumps(body(n=32, max_tokens=100)).encode()
        held.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        while not httpx.get(url + "/state").json()["queued"]:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) in (0, 143)  # 0: the answer was faster
        held.close()


def test_a_failed_engine_ends_the_process(toy_copy, reseal):
    path = toy_copy / "weights" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1024] + b"\xff" * 1024)  # not numbers
    reseal(toy_copy, {})
    with running(toy_copy) as (process, url):
        reply = httpx.post(url + "/v1/chat/completions", json=body())
        assert reply.status_code == 500 and "not finite numbers" in reply.json()["error"]["message"]
        ended(process, 7)
        assert "the engine failed" in process.stderr.read()


def test_tls(toy_build, tmp_path):
    made = subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out",
                           "cert.pem", "-days", "2", "-subj", "/CN=localhost"], cwd=tmp_path, capture_output=True)
    if made.returncode:
        pytest.skip("no openssl")
    with running(toy_build, "--ssl-certfile", str(tmp_path / "cert.pem"), "--ssl-keyfile",
                 str(tmp_path / "key.pem")) as (_, url):
        assert url.startswith("https://") and httpx.get(url + "/health", verify=False).status_code == 200


@pytest.mark.parametrize(("flags", "words"), [
    (["--port", "99999"], "--port 99999"), (["--port", "0", "--tool-call-parser", "x"], "unknown tool call parser 'x'"),
    (["--port", "0", "--reasoning-parser", "x"], "unknown reasoning parser 'x'"),
    (["--port", "0", "--ssl-certfile", "cert.pem"], "go together"),
    (["--port", "0", "--drain-timeout", "-1"], "--drain-timeout -1"), (["--port", "0", "--api-key", ""], "--api-key"),
    (["--port", "0", "--host", "256.1.1.1"], "cannot listen on 256.1.1.1:0"),
    (["--port", "0", "--max-queued-requests", "-1"], "--max-queued-requests -1"),
    (["--port", "0", "--seed", "3"], "--seed: not with --port"),
    (["--port", "0", "--mem-fraction-static", "2"], "--mem-fraction-static 2"),
    (["--port", "0", "--temperature", "-1"], "temperature=-1.0"),
    (["--port", "0", "--nonsense"], "unrecognized arguments: --nonsense"),
])
def test_flags_that_cannot_work(toy_build, flags, words):
    done = subprocess.run([*COMMAND, str(toy_build), *flags], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1) and words in done.stderr


def test_a_port_in_use(toy_build):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run([*COMMAND, str(toy_build), "--port", port], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_the_flags_cost_no_time_elsewhere():
    code = ("import sys, qcn_compile.runtime.cli as c; c.parser(); "
            "print([m for m in ('uvicorn', 'starlette', 'pydantic', 'prometheus_client') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_server_is_made_of_short_pieces():
    import ast

    import qcn_compile.runtime.server as server

    for path in Path(server.__file__).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 300, path.name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and path.name != "flags.py":
                assert node.end_lineno - node.lineno < 46, f"{path.name}: {node.name}"
