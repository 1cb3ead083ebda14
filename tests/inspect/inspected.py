"""One trace for all builds of these tests: passes work on a copy."""

import sys
from functools import cache

import qcn_compile.compile  # noqa: F401

traced = cache(sys.modules["qcn_compile.compile"].trace_model)
