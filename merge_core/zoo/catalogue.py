"""The catalogue: really trained experts among which there is something to choose, kept on the disk.

    catalogue = open_catalogue(Path("catalogue-0"), seed=0)      # trains it, or takes it as it lies there
    catalogue.experts["e07"].training.kl_weight  ->  3.0
    task(items("labels", "rev"))                 ->  what merges are labelled on

Features, labels and final scores have items of their own, so that what was chosen on some is reported on
others. `catalogue.json` says what each expert was trained on, what its weights hash to, and which items have
which role. What every merge of two experts scores is measured by `labels`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merge_core import files
from merge_core.checkpoint.published import read_bounded
from merge_core.zoo.build import build
from merge_core.zoo.recipes import RECIPES, ExpertTraining
from merge_core.zoo.tasks import task
from merge_core.zoo.training import Progress

ROLES = {"features": "features", "labels": "labels", "final": "test"}
"""What items are for, and the split they are from. The base was stopped by yet another one, dev."""

_RECORD = "catalogue.json"
_MAX_RECORD = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """An expert of the catalogue: where it lies, how it was trained, the sha256 of its weights (hex)."""

    directory: Path
    training: ExpertTraining
    weights: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """One base and its experts, by name in order; `record` is what `catalogue.json` holds."""

    directory: Path
    base: Path
    experts: Mapping[str, Listed]
    record: bytes

    @property
    def domains(self) -> tuple[str, ...]:
        """Every domain that something was trained on."""
        return tuple(
            dict.fromkeys(domain for listed in self.experts.values() for domain in listed.training.own)
        )


def items(role: str, domain: str) -> str:
    """The name of the task that holds the items of a role."""
    return f"{domain}:{ROLES[role]}"


def open_catalogue(
    directory: Path, *, seed: int, size: str = "catalogue", on_progress: Progress = lambda *_: None
) -> Catalogue:
    """Train the catalogue of a seed into `directory`, or take the complete one that lies there.

    Raises as `build` does.
    """
    zoo = build(directory, seed=seed, size=size, on_progress=on_progress)
    told = json.loads(read_bounded(directory / "zoo.json", _MAX_RECORD))
    trained = RECIPES[size].experts
    experts = {
        name: Listed(directory=path, training=trained[name], weights=told["weights"][name])
        for name, path in zoo.experts.items()
    }
    record = _described(seed, told["weights"]["base"], experts)
    if not (directory / _RECORD).is_file():
        files.replace(directory / _RECORD, record)
    return Catalogue(directory=directory, base=zoo.base, experts=experts, record=record)


def _described(seed: int, base: str, experts: Mapping[str, Listed]) -> bytes:
    domains = dict.fromkeys(domain for listed in experts.values() for domain in listed.training.own)
    listed: list[dict[str, Any]] = [
        {"name": name, "seed": seed, "weights": expert.weights, **asdict(expert.training)}
        for name, expert in experts.items()
    ]
    asked = {role: {domain: task(items(role, domain)).digest for domain in domains} for role in ROLES}
    record = {"version": 1, "seed": seed, "base": base, "experts": listed, "items": asked}
    return (json.dumps(record, indent=2) + "\n").encode()
