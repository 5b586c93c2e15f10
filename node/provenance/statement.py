"""The statement of where a merge comes from: in-toto Statement v1 with SLSA provenance v1, sealed in DSSE.

`provenance.dsse.json` lies in the merged directory and is signed with it. Its build type,
`urn:weft:merge:v1`, means:

- subject: every file of the directory but this one and the signature; the manifest is one of them;
- externalParameters: `plan`, the SHA-256 of weft.plan.json, from which anybody can run the merge again, and
  `agreements`, that of weft.agreements.json, the signed negotiation (null where every parent was local);
- resolvedDependencies: the parents in the plan's order (digest = ModelId, with role, licence and publisher),
  then the engine as a package URL; re-execution needs these and the plan, nothing else;
- byproducts: the Trace, then every output tensor with its root, its operator and the parents it is made of.

It is the builder's own word (SLSA Build L1): what makes it true is an audit.
`MergeProvenance.parse(p.to_bytes()) == p`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from merge_core.checkpoint.manifest import MAX_TENSORS, TENSOR_NAME, Manifest
from merge_core.checkpoint.published import MAX_FILES, TRACE_FILE, check_names
from merge_core.digest import Digest, ModelId, canonical, parse_canonical
from merge_core.errors import CorruptCheckpoint
from merge_core.plan import MergePlan
from node.domain import text
from node.domain.ids import PeerId
from node.errors import VerificationFailed
from node.identity.envelopes import Envelope, open_envelope, seal
from node.identity.keys import PublicPublisherKey, PublisherKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:weft:merge:v1"
MAX_PROVENANCE = 64 << 20
MAX_PARENTS = 256

_BUILDER = "urn:weft:peer:"
_ENGINE = "pkg:pypi/weftmerge@"
_MODEL = "urn:weft:model:"
_ROLES = ("base", "expert")
_TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """A model that went into a merge; `role` is base or expert, `publisher` the key id of who signed it."""

    model_id: ModelId
    role: str
    licence: str
    publisher: Digest | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorOrigin:
    """One output tensor: its root (hex), the operator, and the indices of the parents it is made of."""

    name: str
    root: str
    operator: str
    parents: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeProvenance:
    """What a builder says of one merge; `subjects` (name, digest) sorted, `finished_at` in Unix seconds."""

    subjects: tuple[tuple[str, Digest], ...]
    plan: Digest
    trace: Digest
    agreements: Digest | None
    parents: tuple[Parent, ...]
    tensors: tuple[TensorOrigin, ...]
    builder: PeerId
    engine: str
    finished_at: int

    def to_bytes(self) -> bytes:
        """The canonical bytes of the statement."""
        return canonical(
            {
                "_type": STATEMENT_TYPE,
                "subject": [{"name": name, "digest": _set(digest)} for name, digest in self.subjects],
                "predicateType": PREDICATE_TYPE,
                "predicate": {
                    "buildDefinition": {
                        "buildType": BUILD_TYPE,
                        "externalParameters": {
                            "plan": _set(self.plan),
                            "agreements": None if self.agreements is None else _set(self.agreements),
                        },
                        "resolvedDependencies": [
                            *(_parent_json(parent) for parent in self.parents),
                            {"name": "engine", "uri": _ENGINE + self.engine},
                        ],
                    },
                    "runDetails": {
                        "builder": {"id": _BUILDER + self.builder},
                        "metadata": {
                            "finishedOn": datetime.fromtimestamp(self.finished_at, UTC).strftime(_TIME)
                        },
                        "byproducts": [
                            {"name": TRACE_FILE, "digest": _set(self.trace)},
                            *(_tensor_json(tensor) for tensor in self.tensors),
                        ],
                    },
                },
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> MergeProvenance:
        """Read a statement that may come from anybody; raises VerificationFailed on whatever is not exact."""
        try:
            statement = _read(parse_canonical(data))
            # Every field that was not read, or was read as something else, makes a difference here.
            if statement.to_bytes() != data:
                raise ValueError("it says more than a merge's provenance")
            check_names(name for name, _ in statement.subjects)
            _check_order(statement)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise VerificationFailed(f"not the provenance of a merge: {error}") from error
        except (OverflowError, OSError, RecursionError, CorruptCheckpoint) as error:
            raise VerificationFailed(f"not the provenance of a merge: {error}") from error
        return statement

    def seal(self, publisher: PublisherKey) -> bytes:
        """The content of provenance.dsse.json, signed by the builder's publisher key."""
        return seal(PAYLOAD_TYPE, self.to_bytes(), publisher).to_bytes()


def open_provenance(data: bytes, publisher: PublicPublisherKey) -> MergeProvenance:
    """The statement inside provenance.dsse.json, once `publisher` signed it; raises VerificationFailed."""
    envelope = Envelope.parse(data, limit=MAX_PROVENANCE)
    return MergeProvenance.parse(open_envelope(envelope, PAYLOAD_TYPE, publisher))


def origins(plan: MergePlan, manifest: Manifest) -> tuple[TensorOrigin, ...]:
    """What each tensor of a merged checkpoint is made of; raises VerificationFailed if the two do not fit."""
    planned = [(t.name, t.dtype, t.shape) for t in plan.tensors]
    if planned != [(t.name, t.dtype, t.shape) for t in manifest.tensors]:
        raise VerificationFailed("the plan makes other tensors than the manifest lists")
    return tuple(
        TensorOrigin(name=t.name, root=made.root, operator=t.operator, parents=plan.origins[t.name])
        for t, made in zip(plan.tensors, manifest.tensors, strict=True)
    )


def _parent_json(parent: Parent) -> dict[str, Any]:
    annotations = {"role": parent.role, "licence": parent.licence, "publisher": parent.publisher}
    return {"uri": _MODEL + parent.model_id.hex, "digest": _set(parent.model_id), "annotations": annotations}


def _tensor_json(tensor: TensorOrigin) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "digest": {"weftTensorRoot": tensor.root},
        "annotations": {"operator": tensor.operator, "parents": list(tensor.parents)},
    }


def _read(value: Any) -> MergeProvenance:
    definition, run = value["predicate"]["buildDefinition"], value["predicate"]["runDetails"]
    *parents, engine = text.items(
        definition["resolvedDependencies"], MAX_PARENTS, "parents", lambda item: item
    )
    trace, *tensors = text.items(run["byproducts"], MAX_TENSORS + 1, "byproducts", lambda item: item)
    parameters = definition["externalParameters"]
    finished = datetime.strptime(run["metadata"]["finishedOn"], _TIME).replace(tzinfo=UTC)
    return MergeProvenance(
        subjects=text.items(
            value["subject"], MAX_FILES, "subjects", lambda s: (s["name"], _digest(s["digest"]))
        ),
        plan=_digest(parameters["plan"]),
        trace=_digest(trace["digest"]),
        agreements=None if parameters["agreements"] is None else _digest(parameters["agreements"]),
        parents=tuple(_parent(item) for item in parents),
        tensors=tuple(_tensor(item, len(parents)) for item in tensors),
        builder=PeerId(run["builder"]["id"].removeprefix(_BUILDER)),
        engine=text.text(engine["uri"].removeprefix(_ENGINE), 64, "engine version", empty=False),
        finished_at=int(finished.timestamp()),
    )


def _parent(item: Any) -> Parent:
    annotations = item["annotations"]
    if annotations["role"] not in _ROLES:
        raise ValueError(f"the role of a parent is {str(annotations['role'])[:20]!r}")
    publisher = annotations["publisher"]
    return Parent(
        model_id=ModelId(_digest(item["digest"])),
        role=annotations["role"],
        licence=text.matching(annotations["licence"], text.LICENCE, "licence"),
        publisher=None if publisher is None else Digest(publisher),
    )


def _tensor(item: Any, parents: int) -> TensorOrigin:
    name, annotations = item["name"], item["annotations"]
    if not TENSOR_NAME.fullmatch(name):
        raise ValueError(f"tensor name {name[:80]!r}")
    return TensorOrigin(
        name=name,
        root=Digest("sha256:" + item["digest"]["weftTensorRoot"]).hex,
        operator=text.text(annotations["operator"], 64, "operator", empty=False),
        parents=text.items(
            annotations["parents"],
            MAX_PARENTS,
            "parents",
            lambda i: text.integer(i, "parent", high=parents - 1),
        ),
    )


def _check_order(statement: MergeProvenance) -> None:
    text.ascending([name for name, _ in statement.subjects], "subjects")
    text.ascending([tensor.name for tensor in statement.tensors], "tensors")


def _set(digest: Digest) -> dict[str, str]:
    return {"sha256": digest.hex}


def _digest(value: Any) -> Digest:
    return Digest("sha256:" + value["sha256"])
