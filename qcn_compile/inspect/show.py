"""The views of qcn-inspect as text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

WIDTH, HEIGHT = 72, 12


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"


def summary(data: dict[str, Any]) -> Iterator[str]:
    """The first thing to look at."""
    decision, target = data["decision"], data["target"]
    yield f"{data['path']}: {data['model']} for {target['name']} ({target.get('mcpu') or target.get('arch') or ''})"
    mode = data["weights"]
    stored = size(data["bytes"]["weights"] if mode == "copied" else decision["weight_bytes"])
    yield (f"  weights {stored}{'' if mode == 'copied' else f' ({mode})'}, stored {decision['base']}"
           + ("" if decision["format"] == "none" else f" and {decision['format']} x {decision['activations']}")
           + f"; kernels {size(data['bytes']['kernels'])}; context {data['context_length']}")
    for kind, count in data["caches"].items():
        per = "a page" if kind == "kv" else "a sequence"
        yield f"  {kind:6} {count} layers, {size(data['cache_bytes'][kind])} {per}"
    yield f"  {'plan':18} {'launches':>8} {'workspace':>11} {'moved':>11} {'MFLOP':>11} {'FLOP/B':>7}"
    for plan in data["plans"]:
        yield (f"  {plan['plan']:18} {plan['launches']:8} {size(plan['workspace_bytes']):>11} "
               f"{size(plan['bytes']):>11} {plan['flops'] / 1e6:11.2f} {plan['intensity']:7.2f}")
    yield "  " + ", ".join(f"{name} {text if len(text) < 40 else text[:12]}" for name, text in data["tools"].items())


def ops(data: dict[str, Any]) -> Iterator[str]:
    """Ops of the final graphs, then work per op of each plan."""
    for name, table in data["graphs"].items():
        yield f"@{name}: {sum(table.values())} ops: " + ", ".join(
            f"{op} {n}" for op, n in sorted(table.items(), key=lambda kv: -kv[1]))
    for plan, rows in data["plans"].items():
        total = sum(row["bytes"] for row in rows.values()) or 1
        yield f"plan {plan}"
        for op, row in rows.items():
            yield (f"  {op:18} {row['launches']:5} launches {size(row['bytes']):>11} {row['bytes'] / total:6.1%} "
                   f"{row['flops'] / 1e6:11.3f} MFLOP")


def kernels(data: list[dict[str, Any]]) -> Iterator[str]:
    """A kernel a line, its source below."""
    yield (f"{'code':>9} {'instr':>6} {'vector':>7} {'fma':>5} {'mem':>5} {'branch':>6} {'call':>5} {'bits':>5} "
           f"{'moved':>10}  kernel (ops); weights count at the kernel that reads them, the rest at the op's first")
    for row in data:
        code = row.get("code")
        if code is not None and "widest" not in code:
            yield from _gpu_kernel(row)
            continue
        numbers = " " * 56 if code is None else (
            f"{size(code['bytes']):>9} {code['instructions']:6} {code['vector'] / max(code['instructions'], 1):7.0%} "
            f"{code['fma']:5} {code['memory']:5} {code['branches']:6} {code['calls']:5} {code['widest']:5} ")
        yield f"{numbers}{size(max(row['bytes'].values())):>10}  {row['kernel']} ({', '.join(row['ops'])})"
        yield from (f"{'':67}{line}" for line in (row["source"], _times(row)) if line)


def _gpu_kernel(row: dict[str, Any]) -> Iterator[str]:
    """A GPU kernel: code bytes, then whatever is known of it by name."""
    facts = ", ".join(f"{key} {value}" for key, value in row["code"].items() if key != "bytes")
    moved = size(max(row["bytes"].values()))
    yield f"{size(row['code']['bytes']):>9} {moved:>10}  {row['kernel']} ({', '.join(row['ops'])})"
    yield from (f"{'':22}{line}" for line in (f"{row['source']}: {facts}", _times(row)) if line)


def _times(row: dict[str, Any]) -> str:
    """Predicted and measured microseconds of a launch, plan by plan, as far as they are known."""
    names = [name for name in row["launches"] if name in row["measured"] or name in row["predicted"]]
    known = {name: [f"{word} {1e6 * row[word][name]:.2f}" for word in ("predicted", "measured") if name in row[word]]
             for name in names}
    return "us a launch: " + "; ".join(f"{name} {', '.join(words)}" for name, words in known.items()) if known else ""


def memory(data: dict[str, Any]) -> Iterator[str]:
    """Per plan: planned against the lower bound, and the bytes alive over the steps."""
    for name, plan in data.items():
        bound = plan["lower_bound_bytes"]
        yield (f"plan {name}: workspace {size(plan['workspace_bytes'])}, lower bound {size(bound)} "
               f"(+{plan['workspace_bytes'] / max(bound, 1) - 1:.1%}), {plan['buffers']} buffers, "
               f"{plan['launches']} launches")
        yield from plot(plan["alive"])


def plot(values: list[int], width: int = WIDTH, height: int = HEIGHT) -> Iterator[str]:
    """Columns of blocks: the greatest value of each stretch of steps."""
    if not values or not max(values):
        return
    width = min(width, len(values))
    cuts = [len(values) * i // width for i in range(width + 1)]
    tops = [max(values[a:b]) for a, b in pairwise(cuts)]
    blocks = " ▁▂▃▄▅▆▇█"
    for line in range(height, 0, -1):
        cells = [min(max(top / max(tops) * height - (line - 1), 0), 1) for top in tops]
        label = size(max(tops) * line / height) if line in (height, height // 2) else ""
        yield f"  {label:>10} |" + "".join(blocks[round(8 * cell)] for cell in cells)
    yield f"  {'':10} +{'-' * width}\n  {'':12}step 0 .. {len(values) - 1}"


def decisions(data: dict[str, Any]) -> Iterator[str]:
    """What was chosen and why, and what was left alone and why."""
    for key, value in data["chosen"].items():
        reason = data["reasons"].get({"base": "dtype", "format": "quant"}.get(key, key), "")
        text = " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        yield f"{key:15} {text:10} {reason}"
    for row in data["candidates"]:
        yield f"not chosen: {row['what']}: {row['reason']}"
    for row in data["weights"]:
        names = row["weights"]
        yield f"{row['format']:5} {len(names):4} weights ({row['reason']}): {', '.join(names[:3])}" + (
            f", and {len(names) - 3} more" if len(names) > 3 else "")
    for event in data["rejected"]:
        yield f"not done: {event['pass']}: {event['rule']} at %{event['value']} ({event['where']}): {event['reason']}"
    if not data["rejected"]:
        yield "not done: nothing; every rewrite applied wherever it was tried"


def passes(data: list[dict[str, Any]]) -> Iterator[str]:
    """A pass a line, with what it did; below it what it did not do."""
    for index, row in enumerate(data, 1):
        fired = ", ".join(f"{rule} x{n}" for rule, n in row["fired"].items())
        yield f"{index:3} {row['pass']:22} {row['before']:5} -> {row['after']:5} ops   {fired}"
        for event in row["refused"]:
            yield f"      not: {event['rule']} at %{event['value']}: {event['reason']}"


def device(data: dict[str, Any]) -> Iterator[str]:
    """A line an allocation, and the sums."""
    total = sum(data["bytes"].values())
    for what, size in [*data["bytes"].items(), ("planned", total), ("reserve", data["reserve"]),
                       ("in all", total + data["reserve"])]:
        yield f"{what:12s} {size:15,d} bytes {size / 1e9:9.3f} GB"
    if data["host"]:
        yield f"{'in host memory':14s} {data['host']:13,d} bytes {data['host'] / 1e9:9.3f} GB: the table of tokens"
    yield data["caches"]


def targets(data: list[dict[str, Any]]) -> Iterator[str]:
    """A chip a block."""
    units = {"cores": "", "bandwidth": " GB/s", "memory": " GB", "reserved": " GB", "link": " GB/s", "latency": " us"}
    for chip in data:
        alias = f" (also {', '.join(chip['aliases'])})" if chip["aliases"] else ""
        features = " ".join(["", *chip["features"]])
        planned = "" if chip["builds"] else "; planned for, not built for yet"
        yield f"{chip['name']}{alias}: {chip['kind']}, {', '.join(chip['dtypes'])}{features}{planned}"
        for name, figure in chip["figures"].items():
            yield f"  {name:10} {figure['value']:>10g}{units.get(name, ' GFLOP/s'):9} {figure['source']}"


def diff(data: dict[str, Any]) -> Iterator[str]:
    """One line a difference."""
    yield f"{data['a']} -> {data['b']}" + (": no difference" if data["same"] else "")
    for part in ("target", "decision", "bytes", "tools", "passes"):
        for key, (a, b) in data[part].items():
            yield f"  {part:9} {key}: {_short(a)} -> {_short(b)}"
    for part in ("ops", "plans"):
        for name, changes in data[part].items():
            yield f"  {part:9} {name}: " + ", ".join(f"{key} {_short(a)} -> {_short(b)}"
                                                     for key, (a, b) in changes.items())
    for side, names in data["kernels"].items():
        for name in names:
            yield f"  kernel    {side}: {name}"


def _short(value: Any) -> Any:
    """For a line of a difference: few digits, hashes by their beginning, what is not there as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value[:12] if isinstance(value, str) and len(value) == 64 else value


def verify(data: dict[str, Any]) -> Iterator[str]:
    """What was checked."""
    yield (f"ok: {data['files']} files, {size(data['bytes'])}, every hash matches; {data['plans']} plans and "
           f"{len(data['graphs'])} graphs read")


def profile(data: dict[str, Any]) -> Iterator[str]:
    """Measured time of each op, slowest first within its plan."""
    if data["limits"]:
        read, flops = data["limits"]["read"], data["limits"]["flops"]
        yield f"limits measured now: read {read:.1f} GB/s, products {flops:.0f} GFLOP/s"
    for row in data["rows"]:
        speed = row["bytes"] / row["seconds"] / 1e9 if row["seconds"] else 0.0
        more = f" and {len(row['kernels']) - 1} more" if len(row["kernels"]) > 1 else ""
        yield (f"{row['plan']:18} {row['op']:18} {row['calls']:6} calls {1e6 * row['seconds'] / row['calls']:9.2f} "
               f"us each {speed:8.2f} GB/s  {row['kernels'][0]}{more}")
