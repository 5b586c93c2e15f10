"""What of a model directory is published: the allowed set, and nothing that merely lies there.

    weights     the safetensors files that make up the model
    functional  config, tokenizer, chat template: listed in the manifest
    other       model card, licence, shard index: signed, but outside the ModelId
    records     our own: manifest, signature, provenance
    left_out    everything else, each with the reason, for the person who publishes

The layout is flat: folders below the directory are left out. A symlink is followed, since hub caches consist
of them, but `links` names it: a directory that is served or verified may have none.
"""

from __future__ import annotations

import json
import re
import stat
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core.checkpoint.manifest import FUNCTIONAL_FILES, MAX_FUNCTIONAL_FILE, TENSOR_NAME
from merge_core.errors import CorruptCheckpoint

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
RECIPE_FILE = "mergekit_config.yml"
EVALUATIONS_FILE = "weft.evaluations.jsonl"
SIGNATURE_FILE = "model.sig"
PROVENANCE_FILE = "provenance.dsse.json"
AGREEMENTS_FILE = "weft.agreements.json"
MANIFEST_FILE = "weft.manifest.json"
PLAN_FILE = "weft.plan.json"
PUBLISHER_FILE = "weft.publisher.json"
REPORT_FILE = "weft.report.json"
SEARCH_FILE = "weft.search.json"
TRACE_FILE = "weft.trace.json"
RECORD_FILES = (
    RECIPE_FILE,
    SIGNATURE_FILE,
    PROVENANCE_FILE,
    AGREEMENTS_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    PUBLISHER_FILE,
    REPORT_FILE,
    SEARCH_FILE,
    TRACE_FILE,
)
"""The files that publishing or merging adds."""
MEASURED = "measured after publication; each of its lines carries a signature of its own"
"""Why the file of evaluations is left out."""

MAX_INDEX = 32 << 20
MAX_FILES = 4096
MAX_WEIGHT_FILES = 512

_ALLOWED = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md", ".yml")
_ALLOWED_STARTS = ("LICENSE", "NOTICE")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_FORBIDDEN = frozenset('/\\:*?"<>|')


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A name in the directory that is not published, and why."""

    name: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a directory holds, by kind; every tuple is sorted, `sizes` has each published file in bytes."""

    weights: tuple[str, ...]
    functional: tuple[str, ...]
    other: tuple[str, ...]
    records: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    links: tuple[str, ...]
    sizes: Mapping[str, int]

    @property
    def published(self) -> tuple[str, ...]:
        """All names but those left out and our own records, sorted."""
        return tuple(sorted((*self.weights, *self.functional, *self.other)))

    @property
    def strays(self) -> tuple[LeftOut, ...]:
        """What is left out of a model and has no place beside it either."""
        return tuple(item for item in self.left_out if item.why != MEASURED)


def survey(directory: Path) -> Survey:
    """Sort the contents of a model directory; raises CorruptCheckpoint where there is no checkpoint."""
    sizes, links, left_out = _list(directory)
    present = frozenset(sizes)
    weights = _weights(directory, present)
    functional = tuple(sorted(present.intersection(FUNCTIONAL_FILES)))
    for name in functional:
        if sizes[name] > MAX_FUNCTIONAL_FILE:
            raise CorruptCheckpoint(f"{name} has {sizes[name]} bytes; at most {MAX_FUNCTIONAL_FILE} are read")
    records = tuple(sorted(present.intersection(RECORD_FILES)))
    other = []
    for name in sorted(present.difference(weights, functional, records)):
        measured = name == EVALUATIONS_FILE and name not in links
        why = MEASURED if measured else _unpublished(name, sizes[name])
        if why:
            left_out.append(LeftOut(name=name, why=why))
        else:
            other.append(name)
    left = {item.name for item in left_out}
    check_names(present - left)
    return Survey(
        weights=weights,
        functional=functional,
        other=tuple(other),
        records=records,
        left_out=tuple(sorted(left_out, key=lambda item: item.name)),
        links=tuple(sorted(links - left)),
        sizes={name: sizes[name] for name in sorted(present - left)},
    )


def name_problem(name: str) -> str | None:
    """Why `name` cannot be the name of a published file on every system, or None where it can."""
    if not name or len(name.encode("utf-8", "surrogatepass")) > 255:
        return "its length"
    if not unicodedata.is_normalized("NFC", name):
        return "it is not in Unicode normal form C"
    if any(c in _FORBIDDEN or not c.isprintable() for c in name):
        return "a character that is not allowed in it"
    if name.startswith(".") or name != name.strip() or name.endswith("."):
        return "a dot or space at its start or end"
    if _RESERVED.fullmatch(name.casefold()):
        return "it is reserved on Windows"
    return None


def check_names(names: Iterable[str]) -> None:
    """Require plain names (NFC, no folder, no reserved word) that differ also when case is ignored.

    Raises CorruptCheckpoint.
    """
    seen: dict[str, str] = {}
    for name in sorted(names):
        problem = name_problem(name)
        if problem:
            raise CorruptCheckpoint(
                f"the file name {name[:80]!r} is refused: {problem}", hint="rename it, then: weft add DIR"
            )
        folded = unicodedata.normalize("NFC", name.casefold())
        if folded in seen:
            raise CorruptCheckpoint(
                f"{seen[folded]} and {name} differ only in upper and lower case",
                hint="rename one of them, then: weft add DIR",
            )
        seen[folded] = name


def parse_index(data: bytes) -> dict[str, str]:
    """Read a shard index (`model.safetensors.index.json`): the weight file of each tensor.

    Raises CorruptCheckpoint on whatever is not exact.
    """
    try:
        value = json.loads(data.decode("utf-8"))
        weight_map = value["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("weight_map is not a map of tensors to files")
        for tensor, name in weight_map.items():
            _check_entry(tensor, name)
        if len(set(weight_map.values())) > MAX_WEIGHT_FILES:
            raise ValueError(f"more than {MAX_WEIGHT_FILES} weight files")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"{INDEX} cannot be read: {error}", hint="export the checkpoint again, then: weft add DIR"
        ) from error
    return weight_map


def _check_entry(tensor: str, name: Any) -> None:
    if not TENSOR_NAME.fullmatch(tensor):
        raise ValueError(f"tensor name {tensor[:80]!r}")
    if not isinstance(name, str) or name_problem(name) or not name.endswith(".safetensors"):
        raise ValueError(f"{tensor} is said to lie in {str(name)[:80]!r}")


def _list(directory: Path) -> tuple[dict[str, int], frozenset[str], list[LeftOut]]:
    if not directory.is_dir():
        raise CorruptCheckpoint(f"{directory} is not a directory", hint=f"ls {directory.parent}")
    sizes: dict[str, int] = {}
    links: set[str] = set()
    left_out: list[LeftOut] = []
    for count, path in enumerate(directory.iterdir()):
        if count >= MAX_FILES:
            raise CorruptCheckpoint(f"{directory} has more than {MAX_FILES} entries: not a model's directory")
        try:
            status = path.stat()
        except OSError as error:
            left_out.append(LeftOut(name=path.name, why=f"cannot be opened: {error.strerror}"))
            continue
        if stat.S_ISDIR(status.st_mode):
            left_out.append(LeftOut(name=path.name, why="a folder; the layout is flat"))
        elif not stat.S_ISREG(status.st_mode):
            left_out.append(LeftOut(name=path.name, why="not a regular file"))
        else:
            sizes[path.name] = status.st_size
            if path.is_symlink():
                links.add(path.name)
    return sizes, frozenset(links), left_out


def _weights(directory: Path, present: frozenset[str]) -> tuple[str, ...]:
    """The weight files in use: those that the index names, else the only one."""
    found = {name for name in present if name.endswith(".safetensors") and not name.startswith(".")}
    if INDEX in present:
        used = set(parse_index(read_bounded(directory / INDEX, MAX_INDEX)).values())
    else:
        used = {WEIGHTS} if WEIGHTS in found or len(found) != 1 else set(found)
    if not found:
        raise _no_weights(directory, present)
    missing = sorted(used - found)
    if missing:
        raise CorruptCheckpoint(
            f"{directory} lacks the weight file {missing[0]}"
            + (f" and {len(missing) - 1} more" * (len(missing) > 1)),
            hint="fetch it again, or save it again with save_pretrained, then: weft add DIR",
        )
    return tuple(sorted(used))


def _no_weights(directory: Path, present: frozenset[str]) -> CorruptCheckpoint:
    pickles = sorted(name for name in present if name.endswith(_PICKLES))
    if pickles:
        return CorruptCheckpoint(
            f"{directory} has only pickled weights ({pickles[0]}), which run code when they are opened",
            hint="convert it to safetensors in a sandbox (save_pretrained), then: weft add DIR",
        )
    return CorruptCheckpoint(
        f"{directory} holds no safetensors weights",
        hint=f"ls {directory}; then name one that save_pretrained wrote",
    )


def _unpublished(name: str, size: int) -> str | None:
    """Why a file that the model does not consist of stays behind; None where it is published."""
    if name.startswith("."):
        return "hidden"
    if name.endswith(".safetensors"):
        return "not among the weights in use"
    if not name.endswith(_ALLOWED) and not name.startswith(_ALLOWED_STARTS):
        return "not of a kind that is published"
    if name.endswith(_PICKLES):
        return "not of a kind that is published"
    if size > MAX_FUNCTIONAL_FILE:
        return f"larger than {MAX_FUNCTIONAL_FILE >> 20} MiB"
    return None


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a small file whole; raises CorruptCheckpoint where it has more than `limit` bytes."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CorruptCheckpoint(f"{path.name} has more than {limit} bytes")
    return data
