"""Collect permissively licensed Python sources from wheels and the standard library into train and held-out documents.

usage: python -m tools.tiny_model.corpus WHEEL_FOLDER WORK_FOLDER HELDOUT.jsonl
Fetch the wheels first: pip download --no-deps --only-binary=:all: -d WHEEL_FOLDER -r tools/tiny_model/packages.txt
Writes WORK_FOLDER/documents.jsonl, WORK_FOLDER/sources.json and the held-out sample.
"""

from __future__ import annotations

import ast
import email
import hashlib
import json
import random
import re
import sys
import sysconfig
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

PACKAGE_CAP = 4_000_000  # bytes of one package at most, so that none dominates
HELDOUT_BYTES = 180_000
HELDOUT_SHARE = 400  # one file in so many is held out
SKIPPED_FOLDERS = re.compile(
    r"(^|/)(tests?|testing|_?vendor(ed)?|third_party|externals?|extern|_distutils|locale|locales|lib2to3|idlelib|"
    r"examples?|benchmarks?|site-packages|data|sklearn/externals|templates|turtledemo|pydoc_data|encodings|unicode)/"
)
SKIPPED_FILES = re.compile(r"(^|/)(test_[^/]*|[^/]*_tests?|conftest|_version|[^/]*_pb2|[^/]*_builtins)\.py$")
PERMISSIVE = re.compile(r"MIT|BSD|Apache|PSF|Python Software|ISC|Unlicense|HPND|0BSD", re.I)
COPYLEFT = re.compile(r"GPL|MPL|Mozilla|EUPL|CeCILL|LGPL|CDDL", re.I)


class Document(NamedTuple):
    """One source file."""

    package: str
    path: str
    text: str


LICENCE_TEXTS = {
    "Permission is hereby granted, free of charge": "MIT (from the licence file)",
    "Redistribution and use in source and binary forms": "BSD (from the licence file)",
    "Apache License": "Apache-2.0 (from the licence file)",
}


def licence_file(archive: zipfile.ZipFile) -> str:
    """Recognise the licence by its text, for packages whose metadata state none."""
    members = [n for n in archive.namelist() if ".dist-info/" in n and "LICEN" in n.upper()]
    text = " ".join(archive.read(members[0]).decode("utf-8", "replace").split()) if members else ""
    return next((name for phrase, name in LICENCE_TEXTS.items() if phrase in text), "")


def wheel_licence(archive: zipfile.ZipFile) -> tuple[str, str]:
    """-> (name and version, licence as the package states it)."""
    member = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    meta = email.message_from_bytes(archive.read(member))
    stated = [str(meta.get("License-Expression") or "")]
    stated += [c.split("::")[-1].strip() for c in meta.get_all("Classifier") or [] if c.startswith("License")]
    if not any(stated):
        stated = str(meta.get("License") or "").strip().splitlines()[:1] or [licence_file(archive)]
    return f"{meta['Name']} {meta['Version']}", ", ".join(filter(None, stated))


def strip_header(text: str) -> str:
    """Drop a leading comment block that is a licence or an encoding notice."""
    match = re.match(r"(?:[ \t]*#[^\n]*\n|[ \t]*\n)+", text)
    if match and re.search(r"licen[sc]e|copyright|coding[:=]|#!", match[0], re.I):
        return text[match.end() :]
    return text


def acceptable(text: str) -> bool:
    """Hand-written looking, parseable Python of moderate size."""
    if not 200 <= len(text) <= 100_000 or "\0" in text:
        return False
    lines = text.splitlines()
    if max(map(len, lines)) > 300 or len(text) / len(lines) > 70:
        return False
    if sum(c.isdigit() for c in text) > 0.08 * len(text) or sum(ord(c) > 127 for c in text) > 0.005 * len(text):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return len(ast.parse(text).body) > 1
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def clean(raw: bytes) -> str | None:
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n").expandtabs(4)
    except UnicodeDecodeError:
        return None
    text = strip_header(text).strip() + "\n"
    return text if acceptable(text) else None


def wanted(path: str) -> bool:
    return path.endswith(".py") and not SKIPPED_FOLDERS.search(path) and not SKIPPED_FILES.search(path)


def read_wheel(file: Path) -> tuple[str, str, list[Document]]:
    """-> (name and version, licence, documents in a fixed random order up to the cap)."""
    with zipfile.ZipFile(file) as archive:
        name, licence = wheel_licence(archive)
        if COPYLEFT.search(licence) or not PERMISSIVE.search(licence):
            return name, licence, []
        members = [n for n in archive.namelist() if wanted(n)]
        return name, licence, take(name, ((n, archive.read(n)) for n in shuffled(members)))


def read_stdlib() -> tuple[str, str, list[Document]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p.relative_to(root).as_posix() for p in root.rglob("*.py") if "site-packages" not in p.parts]
    name = f"Python standard library {sysconfig.get_python_version()}"
    return name, "PSF-2.0", take(name, ((p, (root / p).read_bytes()) for p in shuffled(filter(wanted, paths))), 2)


def shuffled(items: Iterator[str] | list[str]) -> list[str]:
    items = sorted(items)
    random.Random(len(items)).shuffle(items)
    return items


def take(name: str, files: Iterator[tuple[str, bytes]], cap: int = 1) -> list[Document]:
    documents, size = [], 0
    for path, raw in files:
        text = clean(raw)
        if text:
            documents.append(Document(name, path, text))
            size += len(text)
        if size > cap * PACKAGE_CAP:
            break
    return documents


def digest(text: str) -> str:
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Remove duplicates (ignoring white space), then hold out by content hash."""
    unique = {digest(d.text): d for d in documents}
    train = [d for h, d in unique.items() if int(h, 16) % HELDOUT_SHARE]
    heldout = [d for h, d in unique.items() if int(h, 16) % HELDOUT_SHARE == 0]
    return train, heldout


def write_heldout(documents: list[Document], licences: dict[str, str], path: Path) -> None:
    """A sample of the held-out files small enough to live in the repository."""
    random.Random(0).shuffle(documents)
    lines, size = [], 0
    for d in documents:
        if len(d.text) < 15_000 and size + len(d.text) < HELDOUT_BYTES:
            lines.append(json.dumps({"source": f"{d.package}: {d.path}", "licence": licences[d.package], "text": d.text}))
            size += len(d.text)
    path.write_text("\n".join(lines) + "\n")
    print(f"held out: {len(documents)} files, {len(lines)} of them ({size:,} characters) in {path.name}")


def main(wheels: Path, work: Path, heldout_file: Path) -> None:
    with ProcessPoolExecutor() as pool:
        results = [read_stdlib(), *pool.map(read_wheel, sorted(wheels.glob("*.whl")))]
    licences = {name: licence for name, licence, documents in results if documents}
    train, heldout = split([d for _, _, documents in results for d in documents])
    sizes = Counter()
    for d in train:
        sizes[d.package] += len(d.text)
    work.mkdir(parents=True, exist_ok=True)
    with (work / "documents.jsonl").open("w") as out:
        for d in train:
            out.write(json.dumps(d._asdict()) + "\n")
    sources = [{"package": p, "licence": licences[p], "characters": sizes[p]} for p in sorted(licences, key=str.lower)]
    (work / "sources.json").write_text(json.dumps(sources, indent=1) + "\n")
    write_heldout(heldout, licences, heldout_file)
    skipped = [f"{name} ({licence})" for name, licence, documents in results if not documents]
    print(f"train: {len(train)} files, {sum(sizes.values()):,} characters, {len(sources)} packages; none from {skipped}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
