"""Pinned input arrays of GPU steps, filled by the host while the device may still read the set before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcn_compile.artifact import Plan
from qcn_compile.runtime.batch import Capacity, InputArrays
from qcn_compile.runtime.cuda.device import CudaDevice
from qcn_compile.runtime.cuda.footprint import input_sizes, offsets


class Stage:
    """One of two sets of pinned input arrays: the host fills one while the device may still wait to read the other.

    Every plan has its own layout of them, as tight as its capacities, so that little is copied; block table last.
    """

    def __init__(self, device: CudaDevice, plans: Sequence[Plan], width: int) -> None:
        self.arrays = {plan.key: _inputs(plan, width) for plan in plans}
        self.offsets = {plan.key: offsets(plan, width) for plan in plans}
        self.nbytes = max(places["end"] for places in self.offsets.values())
        block = device.pinned(self.nbytes)
        block[:] = 0
        for key, inputs in self.arrays.items():
            for name, array in inputs.arrays.items():
                at = self.offsets[key][name]
                inputs.arrays[name] = block[at:at + array.nbytes].view(np.int32)
        self.block = block
        self.chosen = device.pinned(4 * max(plan.rows for plan in plans)).view(np.int32)
        self.done = device.event(timed=False)

    def used(self, plan: Plan) -> int:
        """Bytes to copy: all arrays, of the block table only what is filled."""
        counts = self.arrays[plan.key].arrays["counts"]
        return self.offsets[plan.key]["block_table"] + 4 * int(counts[1]) * int(counts[3])


def _inputs(plan: Plan, width: int) -> InputArrays:
    inputs = InputArrays([Capacity(plan.tokens, plan.sequences, plan.rows)], width)
    inputs.arrays = {name: np.zeros(size, np.int32) for name, size in input_sizes(plan, width).items()}
    return inputs
