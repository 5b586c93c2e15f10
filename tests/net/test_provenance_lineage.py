"""Lineage: the tree that signed statements span, and what cuts it off."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from merge_core.checkpoint.published import PROVENANCE_FILE
from merge_core.digest import ModelId
from merge_core.errors import CorruptCheckpoint
from merge_core.files import replace as put
from node.errors import VerificationFailed
from node.provenance import lineage as walk
from node.provenance.lineage import Origin, lineage
from node.provenance.statement import open_provenance


def nowhere(_: ModelId) -> None:
    return None


def restate(family, **changes) -> None:
    """Let the builder state something else of the merged model."""
    publisher = family.builder.publisher
    statement = open_provenance((family.merged / PROVENANCE_FILE).read_bytes(), publisher.public)
    put(family.merged / PROVENANCE_FILE, replace(statement, **changes).seal(publisher))


def test_a_merge_leads_to_its_parents(family) -> None:
    tree = lineage(family.merged, family.of)
    assert (tree.model_id, tree.origin) == (family.manifest.model_id, Origin.MERGED)
    assert [p.model_id for p in tree.parents] == list(family.plan.inputs)
    assert [(p.role, p.licence, p.origin) for p in tree.parents] == [
        ("base", "Apache-2.0", Origin.PUBLISHED),
        ("expert", "Apache-2.0", Origin.PUBLISHED),
        ("expert", "Apache-2.0", Origin.PUBLISHED),
    ]
    assert tree.operators == ("ties",)
    assert tree.roots == tuple(sorted(family.plan.inputs))
    assert tree.to_json()["parents"][0]["publisher"] == family.owner.publisher.key_id


def test_parents_that_are_not_at_hand_are_still_named(family) -> None:
    tree = lineage(family.merged, nowhere)
    assert [p.model_id for p in tree.parents] == list(family.plan.inputs)
    assert {p.origin for p in tree.parents} == {Origin.NOT_HERE}


def test_a_directory_of_another_model_is_not_taken_for_a_parent(family) -> None:
    tree = lineage(family.merged, lambda _: family.parents["math"])
    assert [p.origin for p in tree.parents] == [Origin.UNREADABLE, Origin.PUBLISHED, Origin.UNREADABLE]
    assert "another model" in tree.parents[0].detail


def test_a_merge_that_nobody_signed_is_read_from_its_plan(family) -> None:
    for name in (PROVENANCE_FILE, "weft.publisher.json", "model.sig"):
        (family.merged / name).unlink()
    tree = lineage(family.merged, family.of)
    assert (tree.origin, tree.publisher, tree.operators) == (Origin.UNSIGNED, None, ("ties",))
    assert [p.origin for p in tree.parents] == [Origin.PUBLISHED] * 3


def test_provenance_that_the_publisher_did_not_sign_is_not_followed(family) -> None:
    statement = open_provenance(
        (family.merged / PROVENANCE_FILE).read_bytes(), family.builder.publisher.public
    )
    put(family.merged / PROVENANCE_FILE, statement.seal(family.owner.publisher))
    with pytest.raises(VerificationFailed, match="not signed by"):
        lineage(family.merged, family.of)


def test_a_model_that_claims_to_be_its_own_ancestor_is_cut_off(family) -> None:
    me = family.manifest.model_id
    parents = open_provenance(
        (family.merged / PROVENANCE_FILE).read_bytes(), family.builder.publisher.public
    ).parents
    restate(family, parents=(replace(parents[0], model_id=me), *parents[1:]))
    tree = lineage(family.merged, lambda model: family.merged if model == me else None)
    assert tree.parents[0].origin is Origin.CUT_OFF
    assert len(list(tree.walk())) == 4


def test_a_tree_of_many_models_is_cut_off(family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "MAX_MODELS", 2)
    tree = lineage(family.merged, family.of)
    assert [p.origin for p in tree.parents] == [Origin.PUBLISHED, Origin.PUBLISHED, Origin.CUT_OFF]


def test_the_graph_cannot_be_broken_by_what_a_statement_says(family) -> None:
    statement = open_provenance(
        (family.merged / PROVENANCE_FILE).read_bytes(), family.builder.publisher.public
    )
    evil = 'x\\" ]; evil [ label="'
    restate(family, tensors=tuple(replace(t, operator=evil) for t in statement.tensors))
    dot = lineage(family.merged, nowhere).to_dot()
    assert dot.startswith("digraph lineage {") and dot.endswith("}\n")
    assert dot.count(" -> ") == 3
    assert r"x\\\" ]; evil [ label=\"" in dot
    for line in dot.splitlines():
        bare = line.replace("\\\\", "").replace('\\"', "")
        assert bare.count('"') % 2 == 0 and "evil" not in "".join(bare.split('"')[::2])


def test_what_is_no_published_directory_has_no_lineage(family, tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint):
        lineage(tmp_path / "nowhere", nowhere)
    shutil.copytree(family.parents["base"], tmp_path / "bare")
    (tmp_path / "bare" / "weft.manifest.json").unlink()
    with pytest.raises(VerificationFailed, match=r"weft\.manifest\.json is missing"):
        lineage(tmp_path / "bare", nowhere)
