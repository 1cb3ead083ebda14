"""qcn-run --ray: replicas behind one address survive kills; no client waits for what is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from qcn_compile.runtime.cli import main

pytest.importorskip("ray")
pytestmark = pytest.mark.slow  # Ray and two servers take half a minute to start
PROMPT = "".join(f"def function_{i}(x):\n    return x + {i}\n\n" for i in range(60))
SILENT, START = 180, 400  # seconds without a word to a client, and until replicas serve, that fail: others use the CPU


@pytest.fixture(scope="module")
def url(builds: Callable[[str], Path]) -> Iterator[str]:
    """The address of two replicas of two ranks each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "qcn_compile.runtime.cli", str(builds("fp32-tp2")), "--ray", "--replicas", "2",
               "--port", str(port), "--threads", "2", "--context-length", "4096", "--accept-any-model"]
    with subprocess.Popen(command) as process:
        try:
            wait(f"http://127.0.0.1:{port}", 2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(SILENT) in (0, 130)


def replicas(url: str) -> list[dict[str, Any]]:
    return httpx.get(f"{url}/replicas", timeout=SILENT).json()["replicas"]  # type: ignore[no-any-return]


def wait(url: str, serving: int, seconds: float = START) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if httpx.get(f"{url}/health", timeout=5).json()["serving"] == serving:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"not {serving} replicas after {seconds} s")


def stream(url: str, prompt: str, tokens: int, began: Callable[[str], object] = str) -> tuple[str, str]:
    """(replica, how it ended): done, lost or refused. `began` is told the replica when the first token is there.

    Fails when nothing comes for SILENT seconds.
    """
    body = {"model": "any", "prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=SILENT) as answer:
        replica, lines = answer.headers.get("x-replica", ""), []
        for line in answer.iter_lines():
            if not lines:
                began(replica)
            lines.append(line)
    if answer.status_code == 503:
        return replica, "refused"
    assert answer.status_code == 200
    if any(line.startswith("data: ") and "error" in json.loads(line[6:]) for line in lines if line != "data: [DONE]"):
        return replica, "lost"
    assert "data: [DONE]" in lines, lines[-3:]
    return replica, "done"


def test_a_prompt_goes_where_its_prefix_is(url: str) -> None:
    def ask(prompt: str) -> tuple[str, int]:
        answer = httpx.post(f"{url}/v1/completions", timeout=SILENT,
                            json={"model": "any", "prompt": prompt, "max_tokens": 4})
        return answer.headers["x-replica"], answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    home, fresh = ask(PROMPT)
    assert fresh == 0
    for more in ("def a", "def bc", "class D"):
        replica, cached = ask(PROMPT + more)
        assert replica == home and cached > 500
    assert ask("# something else\n" + PROMPT)[0] != home  # the other has nothing to do either, and is no worse


VICTIMS: dict[str, Callable[[int], int]] = {"server": lambda pid: pid, "rank": lambda pid: _child(pid),
                                            "actor": lambda pid: _parent(pid)}


@pytest.mark.parametrize("what", VICTIMS)
def test_a_replica_is_killed_under_load(url: str, what: str) -> None:
    """Kill rank 0 of a replica, its other rank, or the actor with both: requests that had begun there end, those that
    wait go to the other replica, which goes on; the replica returns."""
    wait(url, 2)
    before = replicas(url)
    server, streaming = before[0]["pid"], threading.Event()
    victims = [server, _child(server)]
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(stream, url, f"# {i}\n{PROMPT}", 600, lambda r: r == "0" and streaming.set())
                   for i in range(8)]
        assert streaming.wait(SILENT)
        os.kill(VICTIMS[what](server), signal.SIGKILL)
        killed = time.monotonic()
        ends = [future.result(timeout=2 * SILENT) for future in running]
        later = [pool.submit(stream, url, f"# later {i}\n", 16).result(timeout=SILENT) for i in range(4)]
    assert all(end == "done" for replica, end in ends if replica == "1"), ends
    assert {"0", "1"} == {replica for replica, _ in ends} and any(end == "lost" for _, end in ends), ends
    assert all(end == "done" for _, end in later), later
    wait(url, 2)
    print(f"{what}: {ends}; two replicas again after {time.monotonic() - killed:.1f} s")
    after = replicas(url)
    assert after[0]["pid"] != server and after[0]["starts"] == before[0]["starts"] + 1
    assert after[1]["pid"] == before[1]["pid"] and after[1]["starts"] == before[1]["starts"]
    assert not any(Path(f"/proc/{pid}").exists() for pid in victims)


def _child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize(("flags", "words"), [
    (["--replicas", "2", "--port", "0"], "needs --ray"), (["--ray", "--replicas", "0", "--port", "0"], "at least 1"),
    (["--ray", "--prompt", "x"], "give --port too")])
def test_flags(flags: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(tmp_path), *flags]) == 2
    assert words in capsys.readouterr().err


def test_what_never_serves_ends_it(builds: Callable[[str], Path]) -> None:
    command = [sys.executable, "-m", "qcn_compile.runtime.cli", str(builds("bf16")), "--ray", "--port", "0",
               "--context-length", "99999999"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START)
    assert done.returncode != 0 and "ended 3 times before it served" in done.stderr, done.stderr[-800:]
    assert json.dumps("Traceback") not in done.stderr
