"""All verdicts at once, as data for the server's pages: python -m qcn_compile.planning.catalogue [--check].

Writes runtime/server/static/verdicts.json: {"model", "rows": [...]}. A row is one choice of target, GPUs,
quantisation and context length: fits, problem, the degrees, GB a chip by kind, longest_context, concurrency,
ms_per_token and what bounds it, and the two commands, `compile` and `run`. The server may not import the planner; it
reads this file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import qcn_compile
from qcn_compile.errors import UsageError
from qcn_compile.planning.choose import Ask
from qcn_compile.planning.formats import schemes
from qcn_compile.planning.model import CODER_NEXT, find_config
from qcn_compile.planning.verdict import Verdict, decide_plan
from qcn_compile.targets.spec import DATA, Hardware, read_chips

FILE = Path(qcn_compile.__file__).parent / "runtime/server/static/verdicts.json"
GPUS = (1, 2, 4, 8)
CONTEXTS = (32768, 131072, 262144)
COOKBOOK = ("h100-80", "h200", "b200", "mi300x", "mi325x", "mi355x")


def ask_for(chip: Hardware, gpus: int, quant: str, context: int | None) -> Ask:
    """Qwen3-Coder-Next on some GPUs of a chip, with room for the states that a server asks for by default."""
    assert chip.memory is not None
    _, config = find_config(CODER_NEXT, chip.kind)
    return Ask(config, CODER_NEXT, chip, chip.memory.value * 1e9, quant=quant, context=context, gpus=gpus)


def rows() -> Iterator[dict[str, Any]]:
    """A row for every GPU of our own data files, count of GPUs, scheme and context."""
    chips = [chip for path in sorted(DATA.glob("*.toml")) for chip in read_chips(path) if chip.kind == "gpu"]
    for chip in chips:
        for gpus in (n for n in GPUS if n <= chip.node):
            for scheme in schemes("gpu"):
                if all(f.partition("-")[0] in chip.dtypes for f in scheme.formats):
                    for context in CONTEXTS:
                        yield row(chip, gpus, scheme.name, context)


def row(chip: Hardware, gpus: int, quant: str, context: int) -> dict[str, Any]:
    """One verdict, short."""
    head = {"target": chip.name, "gpus": gpus, "quant": quant, "context_length": context}
    try:
        verdict = decide_plan(ask_for(chip, gpus, quant, context))
    except UsageError as error:
        return {**head, "fits": False, "problem": str(error)}
    return {**head, **_short(verdict)}


def _short(verdict: Verdict) -> dict[str, Any]:
    data = verdict.to_json()
    layout, speed = verdict.chosen.layout, data["speed"]
    flags = "".join(f" --{key} {n}" for key, n in (("tp", layout.tp), ("ep", layout.ep), ("pp", layout.pp)) if n > 1)
    build = f"qcn-compile --model {CODER_NEXT} --target {data['target']} --quant {data['quant']}{flags}"
    return {
        "fits": data["fits"], "problem": data["problem"], "planned_only": data["planned_only"], "title": data["title"],
        "layout": data["layout"], "gigabytes": {k: round(v / 1e9, 2) for k, v in data["memory"].items()},
        "longest_context": data["longest_context"], "concurrency": data["concurrency"],
        "ms_per_token": speed.get("ms_per_token"), "bound": speed.get("bound"),
        "tokens_per_second": speed.get("tokens_per_second", {}),
        "compile": f"{build} --context-length {data['context_length']} -o build/",
        "run": "qcn-run build/ --port 8000" if layout.replicas == 1
        else f"qcn-run build/ --port 8000   # one server for each of {layout.replicas} replicas"}


def text() -> str:
    """The file's content: one row a line."""
    lines = ",\n".join(json.dumps(item, separators=(",", ":")) for item in rows())
    return f'{{"model": "{CODER_NEXT}", "rows": [\n{lines}\n]}}\n'


def main() -> int:
    """Write the file; with --check only say whether it is current."""
    if "--check" not in sys.argv:
        FILE.write_text(text(), encoding="utf-8")
    elif not FILE.is_file() or FILE.read_text(encoding="utf-8") != text():
        print(f"{FILE.name} is out of date; run python -m qcn_compile.planning.catalogue")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
