"""The files that a merged model carries beside its weights, and how the directory is signed and finished.

weft.plan.json  weft.trace.json  weft.manifest.json     what was executed, and what came out
weft.agreements.json                                     under which signed agreements, if any
mergekit_config.yml  README.md                           the recipe and a model card; parents by ModelId only
weft.publisher.json  provenance.dsse.json  model.sig     who says so; only where there is an identity
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import yaml

from merge_core.checkpoint.manifest import Manifest
from merge_core.checkpoint.published import survey
from merge_core.checkpoint.reader import file_digest
from merge_core.checkpoint.writer import CheckpointWriter, partial_path
from merge_core.digest import Digest, sha256
from merge_core.plan import MergePlan
from merge_core.recipe import Recipe, rename
from merge_core.trace import Trace
from node.catalog import licences
from node.identity.binding import PUBLISHER_FILE
from node.identity.envelopes import Envelope
from node.identity.keyring import Identity
from node.merging.parents import Parent
from node.provenance import agreements as signed_agreements
from node.provenance import oms, statement
from node.provenance.agreements import AGREEMENTS_FILE
from node.provenance.statement import PROVENANCE_FILE, MergeProvenance

PLAN_FILE = "weft.plan.json"
TRACE_FILE = "weft.trace.json"
MANIFEST_FILE = "weft.manifest.json"
RECIPE_FILE = "mergekit_config.yml"
CARD_FILE = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """A merge that was executed: everything its records are written from; `files` are the functional ones."""

    recipe: Recipe
    plan: MergePlan
    parents: Sequence[Parent]
    trace: Trace
    manifest: Manifest
    files: Mapping[str, bytes]
    agreements: tuple[Envelope, ...] = ()

    @property
    def licence(self) -> str:
        """What every parent's licence asks for together."""
        return combined_licence(self.parents)


def finish(merge: Merge, target: Path, identity: Identity | None, now: float) -> Path:
    """Write the records into the partial checkpoint, sign it and rename it into place (blocking).

    Everything before the rename can be done again: a crash leaves the partial checkpoint and nothing else.
    """
    with CheckpointWriter.create(target, merge.plan.layout) as writer:
        files = {**merge.files, **unsigned_records(merge)}
        if identity is not None:
            files[PUBLISHER_FILE] = identity.binding.to_bytes()
        for name, data in files.items():
            writer.add_file(name, data)
        if identity is not None:
            folder = partial_path(target)
            digests = _digests(folder)
            sealed = provenance(merge, digests, identity, now).seal(identity.publisher)
            writer.add_file(PROVENANCE_FILE, sealed)
            digests[PROVENANCE_FILE] = sha256(sealed)
            oms.sign_directory(folder, identity.publisher, digests, name=target.name)
        return writer.commit()


def unsigned_records(merge: Merge) -> dict[str, bytes]:
    """The records that need no key, by file name."""
    files = {
        PLAN_FILE: merge.plan.to_bytes(),
        TRACE_FILE: merge.trace.to_bytes(),
        MANIFEST_FILE: merge.manifest.to_bytes(),
        RECIPE_FILE: published_recipe(merge).to_yaml().encode(),
        CARD_FILE: card(merge).encode(),
    }
    if merge.agreements:
        files[AGREEMENTS_FILE] = signed_agreements.pack(merge.agreements)
    return files


def provenance(
    merge: Merge, digests: Mapping[str, Digest], identity: Identity, now: float
) -> MergeProvenance:
    """What the builder says of the merge; `digests` has every file but provenance and signature."""
    own = {PROVENANCE_FILE, oms.SIGNATURE_FILE}
    return MergeProvenance(
        subjects=tuple(sorted((name, digest) for name, digest in digests.items() if name not in own)),
        plan=merge.plan.digest,
        trace=merge.trace.digest,
        agreements=digests.get(AGREEMENTS_FILE),
        parents=tuple(
            statement.Parent(
                model_id=parent.model_id,
                role=role_of(merge.plan, position),
                licence=parent.licence,
                publisher=parent.publisher or None,
            )
            for position, parent in enumerate(merge.parents)
        ),
        tensors=statement.origins(merge.plan, merge.manifest),
        builder=identity.peer_id,
        engine=metadata.version("weftmerge"),
        finished_at=int(now),
    )


def role_of(plan: MergePlan, position: int) -> str:
    """What one of the plan's inputs is in it: its base or an expert."""
    return "base" if position == plan.base else "expert"


def published_recipe(merge: Merge) -> Recipe:
    """The recipe with parents named by ModelId, so that it tells nothing of the machine it ran on."""
    return rename(merge.recipe, {parent.reference: parent.model_id for parent in merge.parents})


def card(merge: Merge) -> str:
    """A model card: front matter that hubs read, then the recipe and where to check it."""
    front = {
        "library_name": "transformers",
        "tags": ["merge", "weft"],
        "base_model": [str(parent.model_id) for parent in merge.parents],
        "base_model_relation": "merge",
        **_card_licence(merge.licence),
    }
    parents = "\n".join(
        f"- {role_of(merge.plan, position)} `{parent.model_id}` ({parent.licence})"
        for position, parent in enumerate(merge.parents)
    )
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        f"# A merge by {merge.recipe.method}\n\n"
        f"Model `{merge.manifest.model_id}`, made by plan `{merge.plan.digest}` of:\n\n{parents}\n\n"
        f"```yaml\n{published_recipe(merge).to_yaml()}```\n\n"
        "Anybody can re-execute this merge and compare every byte: `weft verify . --audit full`.\n"
    )


def combined_licence(parents: Sequence[Parent]) -> str:
    """The SPDX expression that satisfies every parent; NOASSERTION when one of them says nothing."""
    names = sorted({parent.licence for parent in parents})
    if licences.NO_LICENCE in names:
        return licences.NO_LICENCE
    return names[0] if len(names) == 1 else " AND ".join(f"({n})" if " OR " in n else n for n in names)


def _card_licence(licence: str) -> dict[str, str]:
    if licence == licences.NO_LICENCE:
        return {}
    if licence in licences.KNOWN:
        return {"license": licence.lower()}
    return {"license": "other", "license_name": licence}


def _digests(folder: Path) -> dict[str, Digest]:
    """SHA-256 of every file of the directory, two at a time."""
    found = survey(folder)
    names = sorted({*found.published, *found.records} - {PROVENANCE_FILE, oms.SIGNATURE_FILE})
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="sha256") as pool:
        hexes = pool.map(lambda name: file_digest(folder / name), names)
        return {name: Digest("sha256:" + digest) for name, digest in zip(names, hexes, strict=True)}
