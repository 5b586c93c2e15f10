"""The shelf: an expert appears whole or not at all, its source stays as it was, signatures are kept."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from merge_core.checkpoint import merkle
from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource, measure
from merge_core.digest import ModelId, sha256
from merge_core.errors import CorruptCheckpoint
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.structural.sketcher import compute
from node.catalog.expert import FINGERPRINT, SKETCH, Origin
from node.catalog.hashes import HashCache
from node.catalog.shelf import Added, Measurable, Shelf, Sketched
from node.domain.reasons import Reason
from node.errors import LocalError, Refused, UsageError, VerificationFailed
from node.identity import keyring
from node.identity.keyring import Identity
from node.provenance import oms

NOW = 1_760_000_000.0


def sketch(measured: Measurable) -> Sketched:
    """The fingerprint as the worker computes it: read through the digests, it fails when they are stale."""
    leaves = LeafTable.parse(Manifest.parse(measured.manifest.read_bytes()), measured.leaves.read_bytes())
    with Checkpoint.open(measured.directory) as checkpoint:
        structure = compute(VerifiedSource(checkpoint, leaves))
    made = Fingerprint(model_id=measured.model_id, structure=structure, behaviour=None)
    return Sketched(fingerprint=made.to_bytes(), silent="the probes are for somebody else")


@pytest.fixture
def alice(tmp_path: Path) -> Identity:
    return keyring.create(tmp_path / "alice" / "identity", NOW)


@pytest.fixture
def bob(tmp_path: Path) -> Identity:
    return keyring.create(tmp_path / "bob" / "identity", NOW)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "alice" / "experts", hashes=HashCache(tmp_path / "alice" / "cache"))


Add = Callable[..., Added]


@pytest.fixture
def add(shelf: Shelf, alice: Identity) -> Add:
    def add(source: Path, **more: object) -> Added:
        return shelf.add(source, identity=alice, sketch=sketch, now=NOW, **more)  # type: ignore[arg-type]

    return add


def picture(directory: Path) -> dict[str, tuple[bytes, int, int]]:
    """Contents, mode and time of everything in a directory."""
    return {
        path.name: (path.read_bytes(), stat.S_IMODE(path.stat().st_mode), path.stat().st_mtime_ns)
        for path in sorted(directory.iterdir())
    }


def test_an_added_model_is_signed_and_its_source_kept(model_dir: Path, add: Add, alice: Identity) -> None:
    (model_dir / "notes.bin").write_bytes(b"not published")
    before = picture(model_dir)
    added = add(model_dir)
    assert picture(model_dir) == before
    assert [item.name for item in added.left_out] == ["notes.bin"]
    assert not added.kept_signature and not added.was_there
    expert = added.expert
    assert (expert.name, expert.licence, expert.origin) == ("tiny", "Apache-2.0", Origin.ADDED)
    assert expert.architecture == "LlamaForCausalLM"
    assert expert.fingerprint == sha256((expert.folder / FINGERPRINT).read_bytes())
    assert expert.sketch == sha256((expert.folder / SKETCH).read_bytes())
    assert added.silent == "the probes are for somebody else"
    signed = oms.verify_directory(expert.directory, alice.publisher.public)
    assert "weft.manifest.json" in signed.files and "notes.bin" not in signed.files
    with Checkpoint.open(expert.directory) as checkpoint:
        assert measure(checkpoint).manifest.model_id == expert.model_id


def test_what_happens_to_the_source_later_does_not_reach_the_shelf(
    model_dir: Path, add: Add, alice: Identity
) -> None:
    expert = add(model_dir).expert
    with (model_dir / "README.md").open("a") as card:
        card.write("An afterthought.")
    (model_dir / "model.safetensors").unlink()
    assert not expert.changed
    oms.verify_directory(expert.directory, alice.publisher.public)


def test_a_killed_add_leaves_nothing(model_dir: Path, tmp_path: Path, alice: Identity, shelf: Shelf) -> None:
    script = (
        "import sys, pathlib\nfrom node.catalog.shelf import Shelf\nfrom node.identity import keyring\n"
        "source, home = map(pathlib.Path, sys.argv[1:])\n"
        "def sketch(measured):\n    print('half way', flush=True)\n    return sys.stdin.buffer.read()\n"
        "Shelf(home / 'experts').add(\n"
        "    source, identity=keyring.load(home / 'identity'), sketch=sketch, now=1.0)\n"
    )
    adding = subprocess.Popen(
        [sys.executable, "-c", script, str(model_dir), str(tmp_path / "alice")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert adding.stdin is not None and adding.stdout is not None
    assert adding.stdout.readline() == b"half way\n"
    assert len(left(Shelf(shelf.root))) == 1
    adding.kill()
    adding.wait()
    adding.stdin.close()
    adding.stdout.close()
    again = Shelf(shelf.root)
    assert left(again) == [] and again.experts() == ()
    added = again.add(model_dir, identity=alice, sketch=sketch, now=NOW)
    assert not added.was_there


def test_what_is_held_survives_a_restart(model_dir: Path, add: Add, shelf: Shelf) -> None:
    expert = add(model_dir, name="Tiny expert", licence="mit").expert
    again = Shelf(shelf.root)
    assert again.experts() == (expert,) == shelf.experts()
    assert again.resolve("Tiny expert") == again.resolve(expert.model_id[:20]) == expert
    held = again.open(expert.model_id)
    assert Manifest.parse(held.manifest).model_id == held.model_id == expert.model_id
    assert LeafTable.parse(Manifest.parse(held.manifest), held.leaf_table) == held.leaves
    assert held.files["model.sig"] == (expert.directory / "model.sig").stat().st_size
    name, span = held.tensors["model.norm.weight"]
    data = (expert.directory / name).read_bytes()[span.begin : span.end]
    assert np.frombuffer(data, "<f4").tolist() == [1.0] * 16


def test_adding_again_changes_only_the_note(model_dir: Path, add: Add, shelf: Shelf) -> None:
    first = add(model_dir).expert
    inode = (first.directory / "model.sig").stat().st_ino
    again = add(model_dir, name="renamed", licence="MIT")
    assert again.was_there and again.expert.model_id == first.model_id
    assert (again.expert.directory / "model.sig").stat().st_ino == inode
    assert [(e.name, e.licence) for e in Shelf(shelf.root).experts()] == [("renamed", "MIT")]


def test_the_signature_of_another_publisher_is_kept(
    model_dir: Path, tmp_path: Path, add: Add, bob: Identity, shelf: Shelf
) -> None:
    theirs = Shelf(tmp_path / "bob" / "experts").add(model_dir, identity=bob, sketch=sketch, now=NOW)
    added = add(theirs.expert.directory, name="of bob")
    assert added.kept_signature and not added.replaced
    assert added.expert.publisher == bob.publisher.key_id
    assert picture(added.expert.directory).keys() == picture(theirs.expert.directory).keys()
    oms.verify_directory(added.expert.directory, bob.publisher.public)
    mine = add(model_dir)
    assert mine.expert.model_id == added.expert.model_id
    assert {e.publisher for e in shelf.all(mine.expert.model_id)} == {
        bob.publisher.key_id,
        mine.expert.publisher,
    }


def test_a_signature_that_does_not_hold_is_replaced_and_reported(
    model_dir: Path, tmp_path: Path, add: Add, alice: Identity, bob: Identity
) -> None:
    theirs = Shelf(tmp_path / "bob" / "experts").add(model_dir, identity=bob, sketch=sketch, now=NOW).expert
    card = theirs.directory / "README.md"
    card.write_text(card.read_text().replace("apache-2.0", "mit"))
    added = add(theirs.directory)
    assert not added.kept_signature and "README.md" in added.replaced
    oms.verify_directory(added.expert.directory, alice.publisher.public)


def test_one_flipped_bit_of_a_weight_is_no_longer_served(model_dir: Path, add: Add, shelf: Shelf) -> None:
    expert = add(model_dir).expert
    path = expert.directory / "model.safetensors"
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert shelf.find(expert.model_id) is None
    with pytest.raises(Refused) as refused:
        shelf.open(expert.model_id)
    assert refused.value.reason is Reason.UNKNOWN_MODEL


def test_a_time_put_back_does_not_hide_other_bytes_from_the_cache_of_digests(
    model_dir: Path, add: Add, shelf: Shelf
) -> None:
    weights = model_dir / "model.safetensors"
    before = weights.stat()
    first = add(model_dir).expert
    shelf.remove(first.model_id)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = add(model_dir).expert
    assert second.model_id != first.model_id
    with Checkpoint.open(second.directory) as checkpoint:
        assert measure(checkpoint).manifest.model_id == second.model_id


def left(shelf: Shelf) -> list[str]:
    return sorted(path.name for path in shelf.root.iterdir())


def test_nothing_is_left_when_adding_fails(model_dir: Path, shelf: Shelf, alice: Identity) -> None:
    def broken(measured: Measurable) -> bytes:
        assert measured.leaves.stat().st_size % merkle.DIGEST_SIZE == 0
        raise LocalError("the worker died")

    with pytest.raises(LocalError, match="the worker died"):
        shelf.add(model_dir, identity=alice, sketch=broken, now=NOW)
    (model_dir / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(CorruptCheckpoint):
        shelf.add(model_dir, identity=alice, sketch=sketch, now=NOW)
    with pytest.raises(UsageError):
        shelf.add(model_dir, identity=alice, sketch=sketch, now=NOW, licence="\x1b[31m")
    assert left(shelf) == []


def test_what_a_crash_left_half_built_is_cleared_but_not_what_is_being_built(
    model_dir: Path, shelf: Shelf, alice: Identity
) -> None:
    shelf.root.mkdir(parents=True)
    (shelf.root / ".partial-crashed").mkdir()
    (shelf.root / ".removed-crashed" / "model").mkdir(parents=True)

    def meanwhile(measured: Measurable) -> bytes:
        Shelf(shelf.root)
        assert [name[:9] for name in left(shelf)] == [".partial-"]
        return sketch(measured)

    expert = shelf.add(model_dir, identity=alice, sketch=meanwhile, now=NOW).expert
    assert left(shelf) == [expert.model_id.hex]
    assert Shelf(shelf.root).experts() == (expert,)


def test_a_removed_expert_is_gone_with_its_folder(model_dir: Path, add: Add, shelf: Shelf) -> None:
    expert = add(model_dir).expert
    assert shelf.remove(expert.model_id) == (expert,)
    assert left(shelf) == [] and shelf.find(expert.model_id) is None
    assert (model_dir / "model.safetensors").exists()
    with pytest.raises(LocalError, match="no expert"):
        shelf.remove(expert.model_id)


def test_a_tensor_is_found_by_its_bytes(model_dir: Path, add: Add, shelf: Shelf) -> None:
    expert = add(model_dir).expert
    content = merkle.content_root([merkle.leaf_digest(np.ones(16, dtype="<f4").tobytes())]).hex()
    found = shelf.locate(content, 64)
    assert found is not None and found.path.parent == expert.directory
    with found.path.open("rb") as file:
        file.seek(found.offset)
        assert np.frombuffer(file.read(64), "<f4").tolist() == [1.0] * 16
    assert shelf.locate(content, 63) is None
    assert shelf.locate("00" * 32, 64) is None
    shelf.remove(expert.model_id)
    assert shelf.locate(content, 64) is None


def test_a_model_that_is_added_again_with_other_probes_has_the_new_fingerprint(
    model_dir: Path, add: Add, shelf: Shelf, alice: Identity
) -> None:
    first = add(model_dir, name="one").expert
    again = add(model_dir, name="two").expert
    assert (again.fingerprint, again.name) == (first.fingerprint, "two")

    def louder(measured: Measurable) -> Sketched:
        told = Fingerprint.parse(sketch(measured).fingerprint)
        quiet = replace(told.structure, layers=())
        made = Fingerprint(model_id=told.model_id, structure=quiet, behaviour=None)
        return Sketched(fingerprint=made.to_bytes())

    added = shelf.add(model_dir, identity=alice, sketch=louder, now=NOW)
    (expert,) = Shelf(shelf.root).experts()
    assert added.was_there and expert == added.expert and expert.fingerprint != first.fingerprint
    assert expert.sketch == sha256((expert.folder / SKETCH).read_bytes())
    assert oms.verify_directory(expert.directory, alice.publisher.public)


def test_a_fetched_model_is_moved_in_under_its_publisher(
    model_dir: Path, tmp_path: Path, bob: Identity, alice: Identity, shelf: Shelf
) -> None:
    theirs = Shelf(tmp_path / "bob" / "experts").add(model_dir, identity=bob, sketch=sketch, now=NOW).expert
    leaves = Shelf(tmp_path / "bob" / "experts").open(theirs.model_id).leaves
    incoming = tmp_path / "alice" / "incoming" / "x"
    incoming.parent.mkdir(parents=True)
    theirs.directory.rename(incoming)
    signed = (theirs.folder / FINGERPRINT).read_bytes()
    about = {"leaves": leaves, "fingerprint": signed, "name": "of bob", "licence": "MIT", "now": NOW}
    with pytest.raises(VerificationFailed, match="signed by"):
        shelf.adopt(incoming, publisher=alice.publisher.key_id, **about)  # type: ignore[arg-type]
    expert = shelf.adopt(incoming, publisher=bob.publisher.key_id, **about)  # type: ignore[arg-type]
    assert not incoming.exists() and expert.origin is Origin.FETCHED
    assert shelf.open(expert.model_id, bob.publisher.key_id).directory == expert.directory
    oms.verify_directory(expert.directory, bob.publisher.public)


def test_hashing_is_done_once(model_dir: Path, tmp_path: Path) -> None:
    cache = HashCache(tmp_path / "cache")
    with Checkpoint.open(model_dir) as checkpoint:
        first = cache.measure(checkpoint)
        checkpoint.read_bytes = None  # type: ignore[assignment]
        second = cache.measure(checkpoint)
    assert (second.manifest, second.leaves) == (first.manifest, first.leaves)
    assert second.manifest.model_id == ModelId(first.manifest.model_id)
    entry = next((tmp_path / "cache").iterdir())
    entry.write_bytes(entry.read_bytes()[:-1] + b"?")
    with Checkpoint.open(model_dir) as checkpoint:
        assert cache.measure(checkpoint).manifest == first.manifest
    save_file({"a": np.zeros(3, dtype=np.float32)}, model_dir / "model.safetensors")
    with Checkpoint.open(model_dir) as checkpoint:
        assert [tensor.name for tensor in cache.measure(checkpoint).manifest.tensors] == ["a"]
