"""ir-reference.md from the op table, cli-reference.md from the parsers: `python docs/generate.py [--check]`."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from qcn_compile.ir import ops, pattern, text
from qcn_compile.ir.optable import TABLE, OpSpec
from qcn_compile.ir.types import DType, StateKind

HERE = Path(__file__).parent
NOTE = "<!-- made by docs/generate.py; do not edit -->\n"


def ir_reference() -> str:
    """The op table, by the module a row is from."""
    lines = ["# IR reference", "", NOTE, "Made from the op table (`qcn_compile/ir/ops/`): each row holds an op's "
             "signature, shape rule, effects, cost and reference.", "", "## Text form", "", text.__doc__ or "",
             "## Types", "",
             "Elements: " + ", ".join(f"`{d.value}`" for d in DType) + ". Sizes are numbers or `T` (tokens), `S` "
             "(sequences), `R` (rows of logits), possibly scaled (`32*T`). `batch` is the ragged batch. States: "
             + ", ".join(f"`{k.value}`" for k in StateKind)
             + " (keys and values per token; convolution inputs and delta-rule state per sequence).", ""]
    for name in ops.__all__:
        module = getattr(ops, name)
        lines += [f"## {name}", "", (module.__doc__ or "").strip(), ""]
        for spec in sorted(TABLE.values(), key=lambda s: s.name):
            if spec.reference.__module__ == module.__name__:
                lines += _row(spec)
    return "\n".join([*lines, "## Patterns of rewrite rules", "", pattern.__doc__ or ""])


def _row(spec: OpSpec) -> Iterator[str]:
    attrs = [f"`{k}`: {a.type.__name__}" if a.required else f"`{k}` = {a.default!r}" for k, a in spec.attrs.items()]
    facts = ["attributes " + ", ".join(attrs)] if attrs else []
    facts += [f"state `{k}`: {e}" for k, e in spec.effects.items()] + (["commutative"] if spec.commutative else [])
    yield f"### {spec.name}({', '.join(spec.operands)})"
    yield ""
    yield "\n".join(line.strip() for line in spec.doc.splitlines())
    yield ""
    if facts:
        yield "; ".join(facts)
        yield ""


def cli_reference() -> str:
    """Every command, as a table of its flags."""
    from qcn_compile import cli, opt
    from qcn_compile.inspect import cli as inspect_cli
    from qcn_compile.runtime import cli as run_cli
    from qcn_compile.runtime.bench import cli as bench_cli

    lines = ["# Command line reference", "", NOTE]
    for parser in (cli.parser(), run_cli.parser(), opt.parser(), inspect_cli.parser(), bench_cli.parser()):
        lines += _command(parser)
    return "\n".join(lines)


def _command(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## {parser.prog}\n\n{parser.description or ''}\n"
    subs = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    rows = [a for a in parser._actions if a not in subs and not isinstance(a, argparse._HelpAction)]
    if rows:
        yield "| flag | meaning |\n|---|---|"
    for action in rows:
        names = ", ".join(action.option_strings) or str(action.metavar or action.dest).upper()
        kinds = "|".join(map(str, action.choices or ())) or str(action.metavar or action.dest.upper())
        value = "" if action.nargs == 0 or not action.option_strings else " " + kinds.replace("|", "\\|")
        text = (action.help or "").replace("%(default)s", str(action.default)).replace("|", "\\|")
        yield f"| `{names}{value}` | {text} |"
    yield ""
    for sub in subs:
        for child in sub.choices.values():
            yield from _command(child)


def main() -> int:
    """Write both files; with --check only say whether they are current."""
    stale = []
    for name, made in {"ir-reference.md": ir_reference(), "cli-reference.md": cli_reference()}.items():
        body = "\n".join(line.rstrip() for line in made.splitlines()).rstrip() + "\n"
        file = HERE / name
        if not file.is_file() or file.read_text(encoding="utf-8") != body:
            stale.append(name)
            if "--check" not in sys.argv:
                file.write_text(body, encoding="utf-8")
    if "--check" in sys.argv and stale:
        print(f"out of date: {', '.join(stale)}; run python docs/generate.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
