"""For all tests: Ctrl-C works in runs started in the background, and equal kernels are compiled once in a run."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from tests import sharing

if threading.current_thread() is threading.main_thread():  # such a run ignores it, and so would the programs it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def equal_kernels_are_compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        sharing.share_objects(patch, (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "qcn-objects")
        yield


@pytest.fixture
def nothing_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is made anew."""
    monkeypatch.setattr(sharing.emit, "write_object", sharing.write_object)
