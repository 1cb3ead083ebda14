"""The examples as modules, and one trace of the bundled model for all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import qcn_compile.compile  # noqa: F401
from qcn_compile.frontend import Traced, trace_model
from qcn_compile.frontend.checkpoint import locate
from qcn_compile.plugins import load_plugins

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
    return trace_model(locate(None, "cpu"))


@pytest.fixture(autouse=True)
def one_trace(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of a test share the trace: passes work on a copy."""
    monkeypatch.setattr(sys.modules["qcn_compile.compile"], "trace_model", lambda source, dtype, *rest: traced)
