"""qcn-run --ray: replicas behind one address survive kills; no client waits for what is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
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


@pytest.fixture(scope="module")
def url(builds: Callable[[str], Path]) -> Iterator[str]:
    """The address of two replicas."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "qcn_compile.runtime.cli", str(builds("bf16")), "--ray", "--replicas", "2",
               "--port", str(port), "--threads", "1", "--context-length", "4096", "--accept-any-model"]
    with subprocess.Popen(command) as process:
        try:
            wait(f"http://127.0.0.1:{port}", 2, 300)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) in (0, 130)


def replicas(url: str) -> list[dict[str, Any]]:
    return httpx.get(f"{url}/replicas").json()["replicas"]  # type: ignore[no-any-return]


def wait(url: str, serving: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if httpx.get(f"{url}/health", timeout=5).json()["serving"] == serving:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"not {serving} replicas after {seconds} s")


def stream(url: str, prompt: str, tokens: int) -> tuple[str, str]:
    """(replica, how it ended): done, lost or refused. Fails when nothing comes for 60 s."""
    body = {"model": "any", "prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        replica, lines = answer.headers.get("x-replica", ""), []
        for line in answer.iter_lines():
            lines.append(line)
    if answer.status_code == 503:
        return replica, "refused"
    assert answer.status_code == 200
    if any("replica_lost" in line for line in lines):
        return replica, "lost"
    assert "data: [DONE]" in lines, lines[-3:]
    return replica, "done"


def test_a_prompt_goes_where_its_prefix_is(url: str) -> None:
    def ask(prompt: str) -> tuple[str, int]:
        answer = httpx.post(f"{url}/v1/completions", timeout=60,
                            json={"model": "any", "prompt": prompt, "max_tokens": 4})
        return answer.headers["x-replica"], answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    home, fresh = ask(PROMPT)
    assert fresh == 0
    for more in ("def a", "def bc", "class D"):
        replica, cached = ask(PROMPT + more)
        assert replica == home and cached > 500
    assert ask("# something else\n" + PROMPT)[0] != home  # the other has nothing to do either, and is no worse


@pytest.mark.parametrize("whole", [False, True], ids=["server", "actor"])
def test_a_replica_is_killed_under_load(url: str, whole: bool) -> None:
    """Kill one replica's server, or its actor with it: requests end, the other goes on, the replica returns."""
    wait(url, 2, 60)
    before = replicas(url)
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(stream, url, f"# {i}\n{PROMPT}", 400) for i in range(8)]
        while not all(r["requests"] for r in replicas(url)):
            time.sleep(0.1)
        victim = before[0]["pid"]
        os.kill(_parent(victim) if whole else victim, signal.SIGKILL)
        ends = [future.result(timeout=120) for future in running]
        later = [pool.submit(stream, url, f"# later {i}\n", 16).result(timeout=120) for i in range(4)]
    assert all(end == "done" for replica, end in ends if replica == "1")
    assert {"0", "1"} == {replica for replica, _ in ends} and any(end == "lost" for _, end in ends)
    assert all(end == "done" for _, end in later)
    wait(url, 2, 120)
    after = replicas(url)
    assert after[0]["pid"] != victim and after[0]["starts"] == before[0]["starts"] + 1
    assert after[1]["pid"] == before[1]["pid"]
    assert not Path(f"/proc/{victim}").exists()


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode != 0 and "ended 3 times before it served" in done.stderr, done.stderr[-800:]
    assert json.dumps("Traceback") not in done.stderr
