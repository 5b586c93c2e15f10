"""Shelf: the experts that this node holds, one folder for each model and publisher.

    experts/<model id in hex>/<publisher, 16 hex digits>/
        model/            an ordinary checkpoint with weft.manifest.json, weft.publisher.json, model.sig
        leaves.bin        the digest of every MiB
        fingerprint.bin   signed; sketch.bin is the mini of it
        record.json       this node's own note

An expert appears whole or not at all: it is built in a hidden folder and renamed. The folder is the truth;
what is kept in memory is read from it. What a person adds is never written to: weights are reflinked or
hardlinked (then a change of the source is noticed by its time stamp and no longer served), small files are
copied. A valid signature of another publisher is kept; an invalid one is replaced by ours, and reported.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from merge_core import files
from merge_core.checkpoint import merkle
from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.published import (
    MANIFEST_FILE,
    PUBLISHER_FILE,
    SIGNATURE_FILE,
    LeftOut,
    Survey,
    read_bounded,
    survey,
)
from merge_core.checkpoint.reader import Checkpoint, FileStamp, Measured
from merge_core.checkpoint.writer import clone_tree
from merge_core.digest import Digest, ModelId, sha256
from merge_core.errors import CorruptCheckpoint
from merge_core.simmerge.mini import Mini
from node.catalog import licences
from node.catalog.expert import (
    FINGERPRINT,
    LEAVES,
    MODEL,
    RECORD,
    SKETCH,
    Expert,
    Held,
    Origin,
    Stamp,
    display_name,
)
from node.catalog.hashes import HashCache
from node.domain.reasons import Reason
from node.errors import LocalError, Refused, VerificationFailed, of_system
from node.identity.binding import MAX_BINDING, Binding
from node.identity.keyring import Identity
from node.provenance import attest, oms
from node.provenance.fingerprint import SignedFingerprint, sign

_HIDDEN = (".partial-", ".removed-")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurable:
    """Where the measured checkpoint lies, for whoever computes its fingerprint (the worker's `input`)."""

    model_id: ModelId
    directory: Path
    manifest: Path
    leaves: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """Where the bytes of a tensor lie: a weight file, and the offset of the first in it."""

    path: Path
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketched:
    """The bytes of a fingerprint; `silent` says why it holds no behaviour, and is empty where it does."""

    fingerprint: bytes
    silent: str = ""


Sketch = Callable[[Measurable], Sketched]
"""Computes the fingerprint of a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """What `add` did; `replaced` says why a signature that lay in the source was not kept, `silent` why the
    fingerprint tells nothing of what the model says."""

    expert: Expert
    left_out: tuple[LeftOut, ...] = ()
    kept_signature: bool = False
    replaced: str = ""
    silent: str = ""
    was_there: bool = False


class Shelf:
    """The experts below one folder; usable from every thread."""

    def __init__(self, root: Path, *, hashes: HashCache | None = None) -> None:
        """Look at the folder, and clear away what a crash left half built."""
        self.root = root
        self._hashes = hashes or HashCache(None)
        self._lock = threading.RLock()
        self._held: dict[tuple[ModelId, str], Held] = {}
        self._contents: dict[str, tuple[Held, str]] | None = None
        self._sweep()
        self.refresh()

    def refresh(self) -> None:
        """Read the folder again: another process may have added or removed experts."""
        found: dict[tuple[ModelId, str], Held] = {}
        for path in sorted(self.root.glob(f"[!.]*/[!.]*/{RECORD}")):
            try:
                expert = Expert.from_json(json.loads(path.read_bytes()), path.parent)
            except (OSError, ValueError, TypeError, KeyError) as error:
                log.warning("%s cannot be read and is left out: %s", path, error)
                continue
            found[expert.model_id, expert.publisher] = Held(expert)
        with self._lock:
            kept = {key: self._held[key] for key in found if self._same(key, found[key])}
            self._held = {**found, **kept}
            self._contents = None

    def experts(self) -> tuple[Expert, ...]:
        """Every expert, by name and then by id."""
        with self._lock:
            return tuple(
                sorted((held.expert for held in self._held.values()), key=lambda e: (e.name, e.model_id))
            )

    def find(self, model_id: ModelId, publisher: str | None = None) -> Expert | None:
        """An intact expert of this id, by any publisher when that is None."""
        return next((e for e in self.all(model_id) if publisher in (None, e.publisher)), None)

    def all(self, model_id: ModelId) -> tuple[Expert, ...]:
        """The expert as each of its publishers signed it, those left out that were changed on disk."""
        with self._lock:
            found = [held.expert for (found_id, _), held in self._held.items() if found_id == model_id]
        return tuple(expert for expert in found if not expert.changed)

    def resolve(self, wanted: str) -> Expert:
        """The one expert of this name or of an id that begins so; raises LocalError."""
        digits = wanted.removeprefix("sha256:")
        found = [
            e for e in self.experts() if e.name == wanted or (digits and e.model_id.hex.startswith(digits))
        ]
        if not found:
            raise LocalError(f"no expert here is called {wanted[:80]!r}", hint="weft ls")
        if len({expert.model_id for expert in found}) > 1:
            raise LocalError(f"{wanted[:80]!r} names {len(found)} experts", hint="weft ls; then use the id")
        return found[0]

    def open(self, model_id: ModelId, publisher: str | None = None) -> Held:
        """Find an expert to serve from; raises Refused(UNKNOWN_MODEL)."""
        expert = self.find(model_id, publisher)
        with self._lock:
            held = self._held.get((expert.model_id, expert.publisher)) if expert else None
        if held is None:
            raise Refused(Reason.UNKNOWN_MODEL, hint="weft search")
        return held

    def locate(self, content_root: str, length: int) -> Content | None:
        """Where `length` bytes with this content root (hex) lie in a held expert, whatever their type."""
        with self._lock:
            if self._contents is None:
                self._contents = self._index()
            held, tensor = self._contents.get(content_root, (None, ""))
        if held is None or held.expert.changed:
            return None
        name, span = held.tensors[tensor]
        if span.end - span.begin != length:
            return None
        return Content(path=held.directory / name, offset=span.begin)

    def add(
        self,
        source: Path,
        *,
        identity: Identity,
        sketch: Sketch,
        now: float,
        name: str | None = None,
        licence: str | None = None,
        base: ModelId | None = None,
        origin: Origin = Origin.ADDED,
        on_progress: Callable[[int], None] | None = None,
    ) -> Added:
        """Share a checkpoint: survey, clone, hash, sign, fingerprint; `licence` is SPDX, else the card's.

        `on_progress` gets the number of tensor bytes hashed since its last call. Raises CorruptCheckpoint
        on whatever is no whole safetensors checkpoint, LocalError when the disk is full.
        """
        source = source.expanduser().resolve()
        licence = licences.of_card(source) if licence is None else licences.stated(licence)
        found = survey(source)
        with Checkpoint.open(source) as checkpoint:
            measured = self._hashes.measure(checkpoint, on_progress=on_progress)
            before = checkpoint.stamps
        with self._stage() as stage:
            binding, replaced = self._clone(found, source, measured.manifest, stage)
            with Checkpoint.open(source) as checkpoint:
                if _but_for_links(checkpoint.stamps) != _but_for_links(before):
                    raise LocalError(f"{source} was changed while it was added", hint=f"weft add {source}")
                self._hashes.remember(checkpoint, measured.leaves)
            kept = binding is not None
            if binding is None:
                binding = identity.binding
                attest.publish(stage / MODEL, identity, measured.manifest)
            sketched = _sketched(stage, measured, sketch)
            expert = self._describe(
                stage,
                measured,
                fingerprint=sign(sketched.fingerprint, identity),
                publisher=Digest(binding.publisher.key_id),
                name=display_name(name or _name_of(source)),
                licence=licence,
                base=base,
                origin=origin,
                source=str(source),
                now=now,
            )
            expert, was_there = self._place(stage, expert)
        return Added(
            expert=expert,
            left_out=found.left_out,
            kept_signature=kept,
            replaced=replaced,
            silent=sketched.silent,
            was_there=was_there,
        )

    def adopt(
        self,
        directory: Path,
        *,
        leaves: LeafTable,
        publisher: Digest,
        fingerprint: bytes,
        name: str,
        licence: str,
        now: float,
        base: ModelId | None = None,
        source: str = "",
    ) -> Expert:
        """Move a fetched model in, whose every byte was verified against `publisher`'s signature on arrival.

        `directory` must lie on the shelf's file system, and is gone afterwards. The signature itself is
        checked once more, small as it is beside the fetch. Raises VerificationFailed, CorruptCheckpoint,
        LocalError.
        """
        manifest = Manifest.parse((directory / MANIFEST_FILE).read_bytes())
        binding = Binding.parse(read_bounded(directory / PUBLISHER_FILE, MAX_BINDING))
        if binding.publisher.key_id != publisher:
            raise VerificationFailed(f"the model is signed by {binding.publisher.key_id}, not by {publisher}")
        oms.parse_bundle(read_bounded(directory / SIGNATURE_FILE, oms.MAX_BUNDLE)).open(binding.publisher)
        with self._stage() as stage:
            directory.rename(stage / MODEL)
            files.create(stage / LEAVES, leaves.to_bytes())
            expert = self._describe(
                stage,
                Measured(manifest=manifest, leaves=leaves),
                fingerprint=fingerprint,
                publisher=publisher,
                name=display_name(name),
                licence=licence,
                base=base,
                origin=Origin.FETCHED,
                source=source,
                now=now,
            )
            return self._place(stage, expert)[0]

    def remove(self, model_id: ModelId, publisher: str | None = None) -> tuple[Expert, ...]:
        """Withdraw a model, of one publisher or of all; raises LocalError when there is none."""
        with self._lock:
            chosen = [
                held.expert
                for (found, signer), held in self._held.items()
                if found == model_id and publisher in (None, signer)
            ]
            if not chosen:
                raise LocalError(f"no expert {model_id} here", hint="weft ls")
            for expert in chosen:
                self._drop(expert)
        return tuple(chosen)

    def _clone(
        self, found: Survey, source: Path, manifest: Manifest, stage: Path
    ) -> tuple[Binding | None, str]:
        """Build model/ with whatever of the source's own records holds; else say why none of them does."""
        records = () if SIGNATURE_FILE not in found.records else found.records
        model = stage / MODEL
        clone_tree({name: source / name for name in found.weights}, model)
        functional = {file.path: file.sha256 for file in manifest.files}
        for name in (*found.functional, *found.other, *records):
            data = (source / name).read_bytes()
            if functional.get(name, sha256(data)) != sha256(data):
                raise LocalError(f"{source / name} was changed while it was added", hint=f"weft add {source}")
            files.create(model / name, data)
        if not records:
            return None, ""
        try:
            binding = _verified(model, manifest)
        except (VerificationFailed, CorruptCheckpoint, OSError) as error:
            for name in records:
                (model / name).unlink()
            return None, str(error)
        return binding, ""

    def _describe(
        self,
        stage: Path,
        measured: Measured,
        *,
        fingerprint: bytes,
        publisher: Digest,
        name: str,
        licence: str,
        base: ModelId | None,
        origin: Origin,
        source: str,
        now: float,
    ) -> Expert:
        """The expert that the stage holds, with its signed fingerprint, mini and record.json written."""
        manifest = measured.manifest
        mini = Mini.of(SignedFingerprint.parse(fingerprint).fingerprint).to_bytes()
        files.create(stage / FINGERPRINT, fingerprint)
        files.create(stage / SKETCH, mini)
        expert = Expert(
            folder=self.root / manifest.model_id.hex / publisher.hex[:16],
            model_id=manifest.model_id,
            publisher=publisher,
            name=name,
            licence=licence,
            architecture=manifest.architecture,
            base=base,
            size=manifest.size,
            fingerprint=sha256(fingerprint),
            sketch=sha256(mini),
            origin=origin,
            source=source,
            added_at=now,
            stamps=tuple(Stamp.of(stage / MODEL / weights) for weights in survey(stage / MODEL).weights),
        )
        files.create(stage / RECORD, json.dumps(expert.to_json(), indent=1).encode())
        files.sync(stage / MODEL)
        files.sync(stage)
        return expert

    def _place(self, stage: Path, expert: Expert) -> tuple[Expert, bool]:
        """Rename the stage into place; an intact expert with this fingerprint only gets the new note."""
        with self._lock, self._folder_lock():
            there = self._read(expert.folder)
            if there is not None and there.publisher != expert.publisher:
                raise LocalError(f"{expert.folder} belongs to {there.publisher}", hint="weft ls")
            if there is not None and not there.changed and there.sketch == expert.sketch:
                expert = replace(
                    there, name=expert.name, licence=expert.licence, base=expert.base or there.base
                )
                files.replace(expert.folder / RECORD, json.dumps(expert.to_json(), indent=1).encode())
            else:
                if expert.folder.exists():
                    self._hide(expert.folder)
                expert.folder.parent.mkdir(parents=True, exist_ok=True)
                stage.rename(expert.folder)
                files.sync(expert.folder.parent)
                files.sync(self.root)
            self._held[expert.model_id, expert.publisher] = Held(expert)
            self._contents = None
        return expert, there is not None

    @staticmethod
    def _read(folder: Path) -> Expert | None:
        try:
            return Expert.from_json(json.loads((folder / RECORD).read_bytes()), folder)
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _same(self, key: tuple[ModelId, str], found: Held) -> bool:
        known = self._held.get(key)
        return known is not None and known.expert == found.expert

    def _index(self) -> dict[str, tuple[Held, str]]:
        contents: dict[str, tuple[Held, str]] = {}
        for held in self._held.values():
            try:
                leaves, manifest = held.leaves, Manifest.parse(held.manifest)
            except (OSError, CorruptCheckpoint) as error:
                log.warning("%s is damaged: %s", held.expert.folder, error)
                continue
            for tensor in manifest.tensors:
                root = merkle.content_root(leaves[tensor.name]).hex()
                contents.setdefault(root, (held, tensor.name))
        return contents

    def _drop(self, expert: Expert) -> None:
        with self._folder_lock():
            if expert.folder.exists():
                self._hide(expert.folder)
        self._held.pop((expert.model_id, expert.publisher), None)
        self._contents = None

    def _hide(self, folder: Path) -> None:
        """Take an expert away at once, then delete it: a crash in between leaves what `_sweep` clears."""
        hidden = Path(tempfile.mkdtemp(prefix=_HIDDEN[1], dir=self.root))
        folder.rename(hidden / MODEL)
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
        shutil.rmtree(hidden, ignore_errors=True)

    @contextmanager
    def _stage(self) -> Iterator[Path]:
        """A hidden folder, locked as long as it is being built; it goes unless it was renamed away."""
        with self._folder_lock():
            stage = Path(tempfile.mkdtemp(prefix=_HIDDEN[0], dir=self.root))
            descriptor = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            stage.chmod(0o755)
            yield stage
        except OSError as error:
            raise of_system(error, where=self.root) from error
        finally:
            os.close(descriptor)
            shutil.rmtree(stage, ignore_errors=True)

    def _sweep(self) -> None:
        if not self.root.is_dir():
            return
        with self._folder_lock():
            for path in self.root.iterdir():
                if path.name.startswith(_HIDDEN) and _abandoned(path):
                    shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _folder_lock(self) -> Iterator[None]:
        """Keep other processes from renaming or clearing folders for a moment."""
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _verified(model: Path, manifest: Manifest) -> Binding:
    """The binding of whoever signed a directory; raises VerificationFailed unless every file is as signed."""
    if not (model / PUBLISHER_FILE).is_file() or not (model / MANIFEST_FILE).is_file():
        raise VerificationFailed("the signature names no weft publisher")
    binding = Binding.parse(read_bounded(model / PUBLISHER_FILE, MAX_BINDING))
    if (model / MANIFEST_FILE).read_bytes() != manifest.to_bytes():
        raise VerificationFailed("the manifest that was signed does not describe these weights")
    oms.verify_directory(model, binding.publisher)
    return binding


def _sketched(stage: Path, measured: Measured, sketch: Sketch) -> Sketched:
    """Compute the fingerprint of what the stage holds."""
    files.create(stage / LEAVES, measured.leaves.to_bytes())
    return sketch(
        Measurable(
            model_id=measured.manifest.model_id,
            directory=stage / MODEL,
            manifest=stage / MODEL / MANIFEST_FILE,
            leaves=stage / LEAVES,
        )
    )


def _name_of(source: Path) -> str:
    """The folder's name; for a snapshot in a hub cache the name of the repository."""
    if source.parent.name == "snapshots" and source.parent.parent.name.startswith("models--"):
        return source.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return source.name


def _abandoned(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _but_for_links(stamps: Mapping[str, FileStamp]) -> dict[str, FileStamp]:
    """Stamps without the time of the last change, which another hardlink moves too."""
    return {name: stamp._replace(changed_ns=0) for name, stamp in stamps.items()}
