"""A server in this process, on a port of its own; and the bundled model's tokenizer for it."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
from pathlib import Path

import uvicorn

import qcn_compile
from qcn_compile.runtime.server.app import create_app
from qcn_compile.runtime.tokenizer import Tokenizer

ASSETS = Path(qcn_compile.__file__).parent / "assets" / "tiny-coder"


class LiveServer:
    """uvicorn in a thread around a service. `url` has no slash at its end."""

    def __init__(self, service):
        self.service = service
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.loop = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    async def _serve(self):
        self.loop = asyncio.get_running_loop()
        self.service.bridge.start()
        config = uvicorn.Config(create_app(self.service), lifespan="off", log_level="warning", ws="none")
        self._uvicorn = uvicorn.Server(config)
        self._ready.set()
        await self._uvicorn.serve(sockets=[self._socket])

    def call(self, function, *arguments):
        """Run a function on the server's loop."""
        done = threading.Event()
        result = []
        self.loop.call_soon_threadsafe(lambda: (result.append(function(*arguments)), done.set()))
        assert done.wait(10)
        return result[0]

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_):
        self._uvicorn.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
        assert self.service.bridge.stop()


def write_tokenizer(build, template=None):
    folder = build / "tokenizer"
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copy(ASSETS / name, folder / name)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(build)
