"""The zoo's text domains, cut from what every Python carries, and their fixed splits.

    code    the standard library without its docstrings and empty lines
    docs    its longer docstrings, and the topics of `help()`
    tables  the tables of characters in `encodings`

Files are sorted, shuffled with a fixed seed and then split: 10 % dev, 10 % test, the rest train; a file's
docstrings are in the split of the file. Files repeat each other, tables above all: a row of dev that stands
anywhere in the text of train is left out, and one of test that stands in either. So the text depends on
Python's version, patch included, and on nothing else: `digest` says which text it was. Tokens are bytes;
what is not printable ASCII is left out. A row is LENGTH bytes, and as an item the first of them is the prompt
and the others are the answer.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from pydoc_data import topics
from typing import TypeVar

from merge_core.zoo.domains import Item

LENGTH = 128
VOCABULARY = 256
T = TypeVar("T")

TEXT_DOMAINS = ("code", "docs", "tables")
SPLITS = {"test": 192, "dev": 96, "train": 12_000}
"""How many rows each split has; those of `train` overlap."""

_KNOWN: dict[str, tuple[str, ...]] = {"train": (), "dev": ("train",), "test": ("train", "dev")}
"""What a split may not repeat."""
_ELSEWHERE = {
    *("site-packages", "dist-packages", "ensurepip", "pydoc_data"),
    *("test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3"),
}
"""Folders that are not the standard library, or read in another way, or left out by some distributions."""
_LONG_DOCSTRING = 200
_LEFT_OUT = bytes({*range(128)} - {*range(32, 127), *b"\t\n"})


def rows(domain: str, split: str) -> tuple[str, ...]:
    """The rows of one split, distinct and in random order; those of train begin anywhere and overlap."""
    text, others = texts(split)[domain], [texts(other)[domain] for other in _KNOWN[split]]
    step = LENGTH if others else 1
    starts = range(0, len(text) - LENGTH, step)
    found: dict[str, None] = {}
    tried = len(starts) if others else 2 * SPLITS[split]
    for start in random.Random(f"{domain}/{split}").sample(starts, tried):
        row = text[start : start + LENGTH]
        if not any(row in other for other in others):
            found[row] = None
        if len(found) == SPLITS[split]:
            break
    return tuple(found)


def items(domain: str, split: str) -> tuple[Item, ...]:
    """The same rows as items."""
    return tuple(Item(prompt=row[:1], answer=row[1:]) for row in rows(domain, split))


def digest() -> str:
    """What all text of all splits hashes to (hex)."""
    hashed = hashlib.sha256()
    for split in SPLITS:
        for domain, text in texts(split).items():
            hashed.update(f"{domain} {split} {len(text)}\n{text}".encode())
    return hashed.hexdigest()


@lru_cache(maxsize=len(SPLITS))
def texts(split: str) -> Mapping[str, str]:
    """All text of one split by domain; reads the standard library once in a process."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources, tables = _files(library)
    code, docs = [], []
    for path in _share(sources, split):
        program, docstrings = _separated(path.read_text("utf-8", errors="replace"))
        code.append(program)
        docs += docstrings
    docs += [topics.topics[name] for name in _share(sorted(topics.topics), split)]
    encodings = [path.read_text("utf-8", errors="replace") for path in _share(tables, split)]
    parts = zip(TEXT_DOMAINS, (code, docs, encodings), strict=True)
    joined = {domain: "".join(found).encode("ascii", "ignore") for domain, found in parts}
    return {domain: text.translate(None, delete=_LEFT_OUT).decode() for domain, text in joined.items()}


def _files(library: Path) -> tuple[list[Path], list[Path]]:
    """The files of the library and of its `encodings`, by name; none that tells of the machine."""
    sources, tables = [], []
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        folders = path.relative_to(library).parts[:-1]
        if folders[:1] == ("encodings",):
            tables.append(path)
        elif _ELSEWHERE.isdisjoint(folders) and not path.name.startswith(("_sysconfigdata", "python-config")):
            sources.append(path)
    return sources, tables


def _share(found: list[T], split: str) -> list[T]:
    """The part of a sorted list that a split has."""
    shuffled = random.Random("weft zoo").sample(found, len(found))
    tenth = len(found) // 10
    return {"dev": shuffled[:tenth], "test": shuffled[tenth : 2 * tenth]}.get(split, shuffled[2 * tenth :])


def _separated(source: str) -> tuple[str, list[str]]:
    """A program without its docstrings, and those that are long."""
    lines, docstrings = source.split("\n"), []
    for node in _documented(source):
        statement = node.body[0]
        last = statement.end_lineno or statement.lineno
        lines[statement.lineno - 1 : last] = [""] * (last - statement.lineno + 1)
        text = ast.get_docstring(node) or ""
        if len(text) > _LONG_DOCSTRING:
            docstrings.append(text + "\n")
    return "\n".join(line for line in lines if line) + "\n", docstrings


def _documented(source: str) -> list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [node for node in nodes if ast.get_docstring(node, clean=False) is not None]
