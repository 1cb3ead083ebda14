"""Rows of the op table, by theme. Importing this package fills the table."""

from qcn_compile.ir.ops import attention, deltanet, elementwise, linear, moe, norm, parallel, shape

__all__ = ["attention", "deltanet", "elementwise", "linear", "moe", "norm", "parallel", "shape"]
