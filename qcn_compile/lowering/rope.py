"""Where the rotary tables of a build lie, so that a run may replace them: YaRN for contexts longer than the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qcn_compile.lowering.plan import blob_key
from qcn_compile.lowering.schedule import Schedule
from qcn_compile.lowering.weights import BlobKey


def rope_tables(schedules: Sequence[Schedule], names: Mapping[BlobKey, str]) -> list[dict[str, Any]]:
    """Each table once: its blob (f32: `half` frequencies, then a factor), and the `scaling` its kernel has built in."""
    tables: dict[str, dict[str, Any]] = {}
    for step in (step for item in schedules for step in item.steps if step.op.name == "rope_table"):
        for ref in step.call.args:
            if ref.kind == "blob" and ref.layout == "rope":
                key = blob_key(step.op, ref)
                blob = f"{names[key]}.{ref.part}"
                tables[blob] = {"blob": blob, "half": key.shape[0], "scaling": step.op.attrs["scaling"]}
    return list(tables.values())
