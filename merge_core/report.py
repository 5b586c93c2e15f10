"""The sanity report: whether a merge looks like its parents, told by norms that were taken while it ran.

    norms = Norms()
    execute.run(plan, inputs, target, journal=journal, norms=norms)
    report(plan, norms)                                        -> Report

A merged tensor whose norm is far from the mean of its operands' is what a garbled model looks like from the
outside. NaN and infinity are no part of this: a merge that would hold them is refused. Figures are rounded
and for people; nothing is derived from them. `Report.parse(r.to_bytes()) == r`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merge_core.checkpoint.layout import Role, place
from merge_core.checkpoint.published import read_bounded
from merge_core.digest import check_version, parse_bounded
from merge_core.errors import CorruptCheckpoint, MergeCoreError
from merge_core.norms import Norms
from merge_core.operators import COPY
from merge_core.plan import MergePlan

MAX_REPORT = 4 << 20
LOW, HIGH = 0.5, 2.0
"""Ratios of norms outside of these stand out."""

MERGED = "merged"
"""What a reading of the result itself is called."""

MAX_TEXT = 1 << 20
"""Bytes of a text to predict: a model of a billion parameters reads some tens of tokens a second on a CPU."""

_LISTED = 20
_PARTS = {Role.EMBED: "embedding", Role.NORM: "norm", Role.HEAD: "head"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Extreme:
    """A tensor and its norm, in means of its operands' norms."""

    tensor: str
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A layer, or what lies outside of the layers: its norm over its operands', and its extreme tensors."""

    name: str
    tensors: int
    ratio: float
    smallest: Extreme
    largest: Extreme


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How well a model predicts a text: MERGED, or a parent by its name on the hub or its model id."""

    model: str
    bits_per_byte: float
    perplexity: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a merge looks like; `zeros` counts tensors without a weight, `flags` are sentences.

    Of `tensors` some were `copied` and some `measured`; the rest is empty, or too large to square.
    `text` says by its digest which text the readings are of, or why there are none.
    """

    tensors: int
    copied: int
    measured: int
    zeros: int
    parts: tuple[Part, ...]
    flags: tuple[str, ...]
    text: str = ""
    readings: tuple[Reading, ...] = ()

    @property
    def summary(self) -> tuple[str, str]:
        """Two lines for a person."""
        rest = self.tensors - self.copied - self.measured
        words = f"norms of {self.measured} tensors" + (f", {rest} not measured" if rest else "")
        if self.parts:
            low = min((part.smallest for part in self.parts), key=lambda found: found.ratio)
            high = max((part.largest for part in self.parts), key=lambda found: found.ratio)
            words += f": {low.ratio:.3g} to {high.ratio:.3g} times their parents'"
        words += f"; {self.zeros} all zero" if self.zeros else ""
        more = f" (and {len(self.flags) - 1} more)" if len(self.flags) > 1 else ""
        return words, self.flags[0] + more if self.flags else "nothing stands out"

    def to_bytes(self) -> bytes:
        """The file beside the model: JSON for people and programs."""
        return (json.dumps({"version": 1} | asdict(self), indent=1) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes) -> Report:
        """Read a report that may come from anybody; raises CorruptCheckpoint."""
        if len(data) > MAX_REPORT:
            raise CorruptCheckpoint(f"a report of {len(data)} bytes; at most {MAX_REPORT} are read")
        try:
            return _report(parse_bounded(data))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CorruptCheckpoint(f"not a sanity report: {error}") from error


def read_text(path: Path) -> str:
    """Read a text to predict; raises MergeCoreError where it is no UTF-8, empty, or too large."""
    hint = f"weft merge RECIPE -o DIR --perplexity FILE, a text of at most {MAX_TEXT >> 10} KiB"
    try:
        text = read_bounded(path, MAX_TEXT).decode("utf-8")
    except (OSError, CorruptCheckpoint, UnicodeDecodeError) as error:
        raise MergeCoreError(f"{path} cannot be read as text: {error}", hint=hint) from error
    if not text.strip():
        raise MergeCoreError(f"{path} has no text in it", hint=hint)
    return text


def report(plan: MergePlan, norms: Norms) -> Report:
    """What was observed of the result of a plan."""
    taken = {name: found for name, found in norms.taken().items() if all(map(math.isfinite, found))}
    measured = [tensor.name for tensor in plan.tensors if tensor.name in taken]
    members: dict[str, list[str]] = {}
    for name in measured:
        members.setdefault(_part_of(name), []).append(name)
    parts = [_part(name, members[name], taken) for name in sorted(members, key=_order)]
    return Report(
        tensors=len(plan.tensors),
        copied=sum(tensor.operator == COPY.name for tensor in plan.tensors),
        measured=len(measured),
        zeros=sum(taken[name][0] == 0.0 for name in measured),
        parts=tuple(part for part in parts if part is not None),
        flags=tuple(_listed([_flag(name, ratio) for name, ratio in _ratios(measured, taken) if _odd(ratio)])),
    )


def _part_of(tensor: str) -> str:
    at = place(tensor)
    return f"layer {at.layer}" if at.layer is not None else _PARTS.get(at.role, "other")


def _order(part: str) -> tuple[int, int]:
    """The embedding, the layers from below, what follows them."""
    name, _, number = part.partition(" ")
    return ("embedding", "layer", "norm", "head", "other").index(name), int(number or 0)


def _ratios(names: Iterable[str], taken: dict[str, tuple[float, ...]]) -> Iterator[tuple[str, float]]:
    """Each tensor's norm in means of its operands' norms; those whose operands are all zero have none."""
    for name in names:
        own, *operands = taken[name]
        mean = sum(operands) / len(operands)
        if mean:
            yield name, own / mean


def _part(name: str, tensors: Sequence[str], taken: dict[str, tuple[float, ...]]) -> Part | None:
    found = [Extreme(tensor=tensor, ratio=_rounded(ratio)) for tensor, ratio in _ratios(tensors, taken)]
    if not found:
        return None
    own = math.hypot(*(taken[tensor][0] for tensor in tensors))
    means = math.hypot(*(sum(taken[tensor][1:]) / (len(taken[tensor]) - 1) for tensor in tensors))
    return Part(
        name=name,
        tensors=len(tensors),
        ratio=_rounded(own / means),
        smallest=min(found, key=lambda extreme: extreme.ratio),
        largest=max(found, key=lambda extreme: extreme.ratio),
    )


def _odd(ratio: float) -> bool:
    return not LOW <= ratio <= HIGH


def _flag(tensor: str, ratio: float) -> str:
    if ratio == 0.0:
        return f"{tensor} is all zero, and what it was made of is not"
    return f"{tensor} is {_rounded(ratio):g} times as long as what it was made of"


def _listed(flags: list[str]) -> list[str]:
    rest = len(flags) - _LISTED
    return flags[:_LISTED] + ([f"{rest} tensors more stand out like these"] if rest > 0 else [])


def _rounded(ratio: float) -> float:
    return float(f"{ratio:.4g}")


def _report(value: Any) -> Report:
    check_version(value.pop("version"), 1, "report")
    parts = [
        Part(**{**part, "smallest": Extreme(**part["smallest"]), "largest": Extreme(**part["largest"])})
        for part in value.pop("parts")
    ]
    found = Report(
        **{
            **value,
            "parts": tuple(parts),
            "flags": tuple(value["flags"]),
            "readings": tuple(Reading(**reading) for reading in value["readings"]),
        }
    )
    ends = [end for part in parts for end in (part.smallest, part.largest)]
    _all(str, [found.text, *found.flags], [part.name for part in parts], [end.tensor for end in ends])
    _all(int, [found.tensors, found.copied, found.measured, found.zeros], [part.tensors for part in parts])
    _all(int | float, [part.ratio for part in parts], [end.ratio for end in ends])
    for reading in found.readings:
        _all(str, [reading.model])
        _all(int | float, [reading.tokens, reading.bits_per_byte, reading.perplexity])
    return found


def _all(kind: Any, *lists: Sequence[Any]) -> None:
    """Raise ValueError unless every item is of a kind, and no number is negative."""
    for item in (item for items in lists for item in items):
        if not isinstance(item, kind) or (kind is not str and not item >= 0):
            raise ValueError(f"{str(item)[:40]!r} where something else belongs")
