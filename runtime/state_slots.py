"""State slots: one per running sequence, indexing the conv and delta caches of every DeltaNet layer."""

from __future__ import annotations

from collections.abc import Iterable

from qcn_compile.errors import CapacityError


class SlotAllocator:
    """Hands out slot numbers 0..slots-1. Kernels start from zeros at a sequence's first token, so none are cleared."""

    def __init__(self, slots: int) -> None:
        self.total = slots
        self._free = list(range(slots - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def acquire(self) -> int:
        """A slot of one's own. Raises CapacityError when all are taken."""
        if not self._free:
            raise CapacityError(f"all {self.total} state slots are taken; wait for a request to finish, "
                                "or start with a larger --max-running-requests")
        return self._free.pop()

    def release(self, slot: int) -> None:
        """Give a slot back."""
        if not 0 <= slot < self.total or slot in self._free:
            raise ValueError(f"state slot {slot} released without being held")
        self._free.append(slot)

    def check_integrity(self, owners: Iterable[int] | None = None) -> None:
        """Free slots are distinct; with `owners` every other slot must have exactly one."""
        if len(set(self._free)) != len(self._free):
            raise AssertionError("a state slot is free twice")
        if owners is not None and sorted([*self._free, *owners]) != list(range(self.total)):
            raise AssertionError("state slots leaked, or are held twice")
