"""Documented functions cut out of source files: the raw material of the synthetic conversations."""

from __future__ import annotations

import ast
import re
import textwrap
from typing import NamedTuple


class Snippet(NamedTuple):
    """A function with a usable one-sentence description."""

    path: str
    name: str
    arguments: tuple[str, ...]
    summary: str  # first sentence of the docstring, starting in lower case, without the full stop
    source: str
    body: str  # the source without its docstring


def summarise(docstring: str) -> str | None:
    sentence = " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split()).split(". ")[0].rstrip(".")
    if not 12 <= len(sentence) <= 140 or re.search(r"[:`*\\<>|]|^\W|deprecated", sentence):
        return None
    first = sentence.split()[0]
    return sentence if first.isupper() else sentence[0].lower() + sentence[1:]


def without_docstring(lines: list[str], node: ast.FunctionDef) -> list[str]:
    doc = node.body[0]
    return lines[node.lineno - 1 : doc.lineno - 1] + lines[doc.end_lineno : node.end_lineno]


def snippet(path: str, lines: list[str], node: ast.FunctionDef) -> Snippet | None:
    docstring, size = ast.get_docstring(node), node.end_lineno - node.lineno
    if not docstring or len(node.body) < 2 or not 3 <= size <= 40 or node.name.startswith("__"):
        return None
    if node.body[0].lineno == node.lineno or node.body[0].end_lineno >= node.body[1].lineno:
        return None
    summary = summarise(docstring)
    source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
    if not summary or len(source) > 1500:
        return None
    body = textwrap.dedent("\n".join(without_docstring(lines, node)))
    arguments = tuple(a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs if a.arg != "self")
    return Snippet(path, node.name, arguments, summary, source, body)


def extract(path: str, text: str) -> list[Snippet]:
    lines = text.splitlines()
    try:
        nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    except (SyntaxError, ValueError):
        return []
    found = (snippet(path, lines, n) for n in nodes)
    return [s for s in found if s]
