"""A step that was launched: what the host reads of it when it has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qcn_compile.artifact import Plan
from qcn_compile.runtime.cuda.stage import Stage

if TYPE_CHECKING:
    from qcn_compile.runtime.cuda.executable import CudaExecutable


class CudaStep:
    """A step on its way through the stream."""

    def __init__(self, executable: CudaExecutable, plan: Plan, stage: Stage, rows: int) -> None:
        self._executable, self._plan, self._stage, self._rows = executable, plan, stage, rows

    def tokens(self) -> np.ndarray:
        """i32 [R], the tokens chosen; -1 in rows left to the host, and where logits are no numbers."""
        self._executable.wait(self._plan, self._stage)
        return self._stage.chosen[:self._rows].copy()

    def logits(self) -> np.ndarray:
        """f32 [R, vocab] of a step that left rows to the host; valid until the next one."""
        self._executable.wait(self._plan, self._stage)
        return self._executable.widened(self._plan, self._rows)
