"""A replica as a Ray actor: it owns one server process, starts that again when it dies, and takes it along."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

PATIENCE = 60.0  # seconds that a busy server may be silent before it counts as gone; one that ended is seen at once
TRIES = 3  # starts in a row that may end before the server serves
PR_SET_PDEATHSIG = 1


class Server:
    """One `qcn-run BUILD --port N` on this node, for itself alone if `local`. `look` is called again and again."""

    def __init__(self, argv: Sequence[str], local: bool) -> None:
        self._argv, self._failed, self._served = list(argv), 0, False
        self._host = "127.0.0.1" if local else _address()
        self._start()

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind((self._host, 0))
            self._port = probe.getsockname()[1]
        flags = ["--ray", "off", "--replicas", "1", "--host", self._host, "--port", str(self._port)]
        self._served, self._heard = False, time.monotonic()
        self._process = subprocess.Popen([sys.executable, "-m", "qcn_compile.runtime.cli", *self._argv, *flags],
                                         preexec_fn=_die_with_parent, env={**os.environ, "PYTHONUNBUFFERED": "1"})

    def look(self) -> tuple[str | None, int]:
        """(URL when it serves, process id). A dead server is started again.

        Raises RuntimeError when it ended too often without having served: its flags or its build are wrong.
        """
        code = self._process.poll()
        if code is not None:
            self._failed = 0 if self._served else self._failed + 1
            if self._failed == TRIES:
                raise RuntimeError(f"the server ended {TRIES} times before it served, last with exit code {code}")
            print(f"qcn-run: replica {self._process.pid} ended with exit code {code}: starting it again",
                  file=sys.stderr, flush=True)
            self._start()
        url = f"http://{self._host}:{self._port}"
        return (url if self._serves(url) else None), self._process.pid

    def _serves(self, url: str) -> bool:
        """Whether the server takes requests; on a machine with much to do it may come to answer late."""
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                pass
        except urllib.error.HTTPError:
            return False  # it drains, or its engine failed
        except OSError as error:
            late = isinstance(getattr(error, "reason", error), TimeoutError)
            return late and self._served and time.monotonic() - self._heard < PATIENCE
        self._served, self._heard = True, time.monotonic()
        return True


def _address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
