"""Lineage: the tree of a model's ancestors, as far as the provenance of directories at hand tells it.

Every line of it is what some builder signed: a directory says what its parents are, and where a parent's
own directory is found, the walk goes on there. A ModelId is a digest over bytes, so no model can be its own
ancestor; a statement that claims it is cut off, as is a tree that grows without end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from merge_core.checkpoint.manifest import MAX_MANIFEST, Manifest
from merge_core.checkpoint.published import (
    MANIFEST_FILE,
    PLAN_FILE,
    PROVENANCE_FILE,
    PUBLISHER_FILE,
    Survey,
    survey,
)
from merge_core.digest import Digest, ModelId
from merge_core.errors import MergeCoreError
from merge_core.plan import MAX_PLAN, MergePlan
from node.errors import VerificationFailed, WeftError
from node.identity.binding import MAX_BINDING, Binding
from node.provenance.attest import Terms, parents_of
from node.provenance.files import read_record
from node.provenance.statement import MAX_PROVENANCE, Parent, open_provenance

MAX_DEPTH = 32
MAX_MODELS = 1000


class Origin(StrEnum):
    """What is known of where a model comes from."""

    MERGED = "merged"
    UNSIGNED = "merged, unsigned"
    PUBLISHED = "published"
    NOT_HERE = "not here"
    UNREADABLE = "unreadable"
    CUT_OFF = "cut off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """One model with its parents in the plan's order.

    `role` and `licence` are what its child's provenance says of it, empty at the top; `operators` is how it
    was merged; `detail` says why the walk ended here, where it did not end at a root.
    """

    model_id: ModelId
    origin: Origin
    role: str
    licence: str
    publisher: Digest | None
    operators: tuple[str, ...]
    detail: str
    parents: tuple[Lineage, ...]

    def walk(self) -> Iterator[Lineage]:
        """This model and all ancestors, children before parents."""
        yield self
        for parent in self.parents:
            yield from parent.walk()

    @property
    def roots(self) -> tuple[ModelId, ...]:
        """The models at which the tree ends, each once, sorted."""
        return tuple(sorted({model.model_id for model in self.walk() if not model.parents}))

    def to_json(self) -> dict[str, Any]:
        """The tree for `--json`."""
        return {
            "model_id": self.model_id,
            "origin": self.origin.value,
            "role": self.role,
            "licence": self.licence,
            "publisher": self.publisher,
            "operators": list(self.operators),
            "detail": self.detail,
            "parents": [parent.to_json() for parent in self.parents],
        }

    def to_dot(self) -> str:
        """The graph for Graphviz: one node for each model, one edge for each step of a merge."""
        nodes: dict[ModelId, str] = {}
        edges: dict[str, None] = {}
        for model in self.walk():
            if model.model_id not in nodes or model.parents:
                label = _quote(model.model_id.hex[:12], model.origin.value, *model.operators)
                nodes[model.model_id] = f"  {_quote(model.model_id)} [label={label}];"
            for parent in model.parents:
                step = f"{_quote(parent.model_id)} -> {_quote(model.model_id)}"
                edges[f"  {step} [label={_quote(parent.role)}];"] = None
        return "\n".join(["digraph lineage {", "  rankdir=LR;", *nodes.values(), *edges, "}", ""])


def lineage(directory: Path, find: Callable[[ModelId], Path | None]) -> Lineage:
    """Follow a published directory to its roots; `find` gives the directory of a model, where one is at hand.

    Raises VerificationFailed or CorruptCheckpoint where the directory itself cannot be read.
    """
    return _Walk(find).at(directory)


class _Walk:
    """One walk, which counts what it has seen."""

    def __init__(self, find: Callable[[ModelId], Path | None]) -> None:
        self._find = find
        self._left = MAX_MODELS

    def at(
        self, directory: Path, path: tuple[ModelId, ...] = (), role: str = "", licence: str = ""
    ) -> Lineage:
        found = survey(directory)
        model_id = Manifest.parse(read_record(directory, found, MANIFEST_FILE, MAX_MANIFEST)).model_id
        if path and model_id != path[-1]:
            raise VerificationFailed(f"{directory} holds another model")
        path = path or (model_id,)
        said = _said(directory, found)
        return Lineage(
            model_id=model_id,
            origin=said.origin,
            role=role,
            licence=licence,
            publisher=said.publisher,
            operators=said.operators,
            detail="",
            parents=tuple(self._parent(parent, path) for parent in said.parents),
        )

    def _parent(self, parent: Parent, path: tuple[ModelId, ...]) -> Lineage:
        def ends(origin: Origin, detail: str) -> Lineage:
            return Lineage(
                model_id=parent.model_id,
                origin=origin,
                role=parent.role,
                licence=parent.licence,
                publisher=parent.publisher,
                operators=(),
                detail=detail,
                parents=(),
            )

        self._left -= 1
        if parent.model_id in path:
            return ends(Origin.CUT_OFF, "it is claimed to be its own ancestor")
        if len(path) >= MAX_DEPTH or self._left < 0:
            return ends(Origin.CUT_OFF, f"more than {MAX_DEPTH} generations or {MAX_MODELS} models")
        directory = self._find(parent.model_id)
        if directory is None:
            return ends(Origin.NOT_HERE, "no directory of it is at hand: weft get fetches it")
        try:
            return self.at(directory, (*path, parent.model_id), parent.role, parent.licence)
        except (WeftError, MergeCoreError) as error:
            return ends(Origin.UNREADABLE, error.why)
        except OSError as error:
            return ends(Origin.UNREADABLE, str(error))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    """What one directory says of its origin."""

    origin: Origin
    publisher: Digest | None
    parents: tuple[Parent, ...] = ()
    operators: tuple[str, ...] = ()


def _said(directory: Path, found: Survey) -> _Said:
    """Read the provenance that the publisher signed, or the bare plan where nobody signed."""
    publisher = None
    if PUBLISHER_FILE in found.records:
        publisher = Binding.parse(read_record(directory, found, PUBLISHER_FILE, MAX_BINDING)).publisher
    key_id = publisher.key_id if publisher else None
    if publisher and PROVENANCE_FILE in found.records:
        data = read_record(directory, found, PROVENANCE_FILE, MAX_PROVENANCE)
        statement = open_provenance(data, publisher)
        return _Said(
            origin=Origin.MERGED,
            publisher=key_id,
            parents=statement.parents,
            operators=tuple(sorted({tensor.operator for tensor in statement.tensors})),
        )
    if PLAN_FILE in found.records:
        plan = MergePlan.parse(read_record(directory, found, PLAN_FILE, MAX_PLAN))
        terms = dict.fromkeys(plan.inputs, Terms(licence="NOASSERTION", publisher=None))
        return _Said(
            origin=Origin.UNSIGNED,
            publisher=key_id,
            parents=parents_of(plan, terms),
            operators=plan.operators,
        )
    return _Said(origin=Origin.PUBLISHED, publisher=key_id)


def _quote(*lines: str) -> str:
    """A DOT string of several lines: what is inside can neither end it nor escape anything."""
    escaped = (line.replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return '"' + "\\n".join(escaped) + '"'
