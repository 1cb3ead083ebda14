"""The flags of `qcn-run --ray`. Imports nothing heavy: qcn-run reads them on every start."""

from __future__ import annotations

import argparse
import importlib.util

from qcn_compile.errors import UsageError

LOCAL, OFF = "local", "off"


def add_replica_flags(parser: argparse.ArgumentParser) -> None:
    """How many servers, and where."""
    g = parser.add_argument_group("replicas (with --port)")
    g.add_argument("--ray", nargs="?", const=LOCAL, default=OFF, metavar="ADDRESS",
                   help="serve replicas that Ray places and restarts: on this machine (no address) or a cluster (auto, "
                   "or its address)")
    g.add_argument("--replicas", type=int, default=1, metavar="N", help="servers of the build, each with all its ranks")


def check(arguments: argparse.Namespace) -> None:
    """Raises UsageError for what cannot work."""
    if arguments.replicas < 1:
        raise UsageError(f"--replicas {arguments.replicas}: must be at least 1")
    if arguments.ray == OFF:
        if arguments.replicas > 1:
            raise UsageError(f"--replicas {arguments.replicas}: needs --ray")
        return
    if arguments.port is None:
        raise UsageError("--ray: serves, so give --port too")
    if arguments.ssl_certfile is not None:
        raise UsageError("--ray: has no TLS of its own; put a proxy with the certificate in front")
    lacking = [name for name in ("ray", "httpx") if importlib.util.find_spec(name) is None]
    if lacking:
        raise UsageError(f"--ray: needs {' and '.join(lacking)}: pip install 'qcn-compile[ray]'")
