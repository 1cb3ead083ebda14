"""`qcn-run BUILD --ray --replicas N --port P`: replicas placed by Ray, watched, behind one address."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import uvicorn

from qcn_compile.artifact import read_manifest
from qcn_compile.errors import DeviceError, UsageError
from qcn_compile.runtime.replicas.options import LOCAL
from qcn_compile.runtime.replicas.proxy import Proxy
from qcn_compile.runtime.server.launch import listen

EVERY, SILENT = 0.5, 60.0  # seconds between looks at a replica, and until one that does not answer is taken for dead
STORE = 80 << 20  # bytes of Ray's object store: nothing of ours goes through it


def serve(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Until a signal comes. Raises UsageError when the cluster has no room, DeviceError when no replica can start."""
    import ray

    manifest = read_manifest(arguments.build)
    ranks = max(1, len(getattr(manifest, "ranks", ())))
    one = {"CPU": 1.0, **({"GPU": 1.0} if manifest.target.get("kind") == "gpu" else {})}
    local = arguments.ray == LOCAL
    needed = arguments.replicas * ranks
    with listen(arguments.host, arguments.port) as listener:
        ray.init(address=None if local else arguments.ray, num_cpus=max(needed, os.cpu_count() or 1) if local else None,
                 include_dashboard=False if local else None, object_store_memory=STORE if local else None,
                 logging_level=logging.WARNING, log_to_driver=True)
        try:
            actors = [_place(argv, ranks, one, local) for _ in range(arguments.replicas)]
            return asyncio.run(_serve(actors, listener, arguments))
        finally:
            ray.shutdown()


def _place(argv: Sequence[str], ranks: int, one: dict[str, float], local: bool) -> Any:
    """An actor in a placement group of its own: room for each rank, all on one node. It comes back when it dies."""
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from qcn_compile.runtime.replicas.actor import Server

    group = placement_group([one] * ranks, strategy="STRICT_PACK")
    if not group.wait(60):
        have = {key: value for key, value in ray.cluster_resources().items() if key in one}
        raise UsageError(f"--ray: no node has room for {ranks} x {one} for another replica; the cluster has {have} in "
                         "all; ask for fewer --replicas")
    where = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    place = ray.remote(Server).options(scheduling_strategy=where, max_restarts=-1, num_cpus=1, num_gpus=0)
    return place.remote(_paths(argv), local)


def _paths(argv: Sequence[str]) -> list[str]:
    """Paths that exist here, made absolute: an actor works in another folder."""
    return [os.path.abspath(word) if not word.startswith("-") and os.path.exists(word) else word for word in argv]


async def _serve(actors: list[Any], listener: Any, arguments: argparse.Namespace) -> int:
    proxy = Proxy(len(actors))
    config = uvicorn.Config(proxy.app, lifespan="off", log_config=None, access_log=False, ws="none",
                            timeout_graceful_shutdown=int(arguments.drain_timeout))
    server = uvicorn.Server(config)
    watching = [asyncio.ensure_future(_watch(proxy, index, actor)) for index, actor in enumerate(actors)]
    listener.listen(1024)
    host, port = listener.getsockname()[:2]
    print(f"qcn-run: {len(actors)} replicas behind http://{host}:{port}", file=sys.stderr, flush=True)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    done, _ = await asyncio.wait([serving, *watching], return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    for task in watching:
        task.cancel()
    failed = [task.exception() for task in done if task is not serving]
    if failed:
        raise DeviceError(f"--ray: {failed[0]}")
    return 0


async def _watch(proxy: Proxy, index: int, actor: Any) -> None:
    """Tell the proxy what becomes of a replica. Ends with an exception when it cannot be started."""
    from ray.exceptions import RayError, RayTaskError

    while True:
        try:
            proxy.update(index, *await asyncio.wait_for(actor.look.remote(), SILENT))
        except RayTaskError as error:
            raise RuntimeError(str(error.cause)) from error
        except (RayError, TimeoutError):
            proxy.update(index, None)
        await asyncio.sleep(EVERY)
