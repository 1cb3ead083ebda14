"""The examples as modules, and one trace of the bundled model for all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from qcn_compile.frontend import Traced
from qcn_compile.frontend.checkpoint import locate
from qcn_compile.plugins import load_plugins
from tests import sharing

EXAMPLES = Path(__file__).parents[2] / "docs/examples"


@pytest.fixture(scope="session")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """`example("count_flops")`: the module, loaded as --plugin does."""
    sys.path.insert(0, str(EXAMPLES))
    yield lambda name: load_plugins([EXAMPLES / f"{name}.py"], installed=False)[0].module
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="session")
def traced() -> Traced:
    """The bundled model."""
    return sharing.traced(locate(None, "cpu"))


@pytest.fixture(autouse=True)
def shared_trace() -> Iterator[None]:
    with sharing.one_trace():
        yield
