"""The front end: a checkpoint or a config in, Graph IR and a weight source out."""

from qcn_compile.frontend.model import Traced, trace_model

__all__ = ["Traced", "trace_model"]
