"""Fingerprints of models on this machine: those of the shelf, others computed once and kept.

A directory's is kept under its ModelId and the digest of the probes, so that asking again costs no more than
looking whether the files are as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from merge_core import files
from merge_core.checkpoint.reader import Checkpoint, Measured
from merge_core.digest import Digest, canonical, sha256
from merge_core.errors import CorruptCheckpoint
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.functional.probes import ProbeSet
from node.catalog.expert import FINGERPRINT
from node.catalog.hashes import HashCache
from node.catalog.shelf import Measurable, Shelf, Sketch
from node.merging.references import LocalDirectory, Published, parse_reference
from node.provenance.fingerprint import SignedFingerprint
from node.selection.candidate import Candidate

MAX_KEPT = 256
"""Fingerprints of directories that are kept, the newest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """This machine's models; `folder` keeps what `sketch` computes, asking `probes`."""

    shelf: Shelf
    hashes: HashCache
    folder: Path
    probes: ProbeSet
    sketch: Sketch
    silent: Callable[[Path, str], None] = lambda directory, why: None
    """Told why a model can be compared by its weights alone."""

    def has(self, reference: str, desk: Path) -> bool:
        """Whether `find` would find a model, before anything is computed."""
        wanted = parse_reference(reference, desk)
        if isinstance(wanted, LocalDirectory):
            return True
        name = str(wanted.model_id) if isinstance(wanted, Published) else wanted.name
        return self._shelved(name) is not None and not (isinstance(wanted, Published) and wanted.peer)

    def find(self, reference: str, desk: Path) -> Candidate | None:
        """A model that lies here, relative paths being read from `desk`; None where it does not.

        Raises InvalidRecipe, CorruptCheckpoint, Unmergeable, LocalError.
        """
        wanted = parse_reference(reference, desk)
        if isinstance(wanted, LocalDirectory):
            return self._directory(wanted.path)
        if isinstance(wanted, Published):
            return None if wanted.peer else self._shelved(str(wanted.model_id))
        return self._shelved(wanted.name)

    def _shelved(self, name: str) -> Candidate | None:
        found = [e for e in self.shelf.experts() if name in (e.name, e.model_id) and not e.changed]
        if len({expert.model_id for expert in found}) != 1:
            return None  # of several of one name the node says so
        expert = found[0]
        signed = SignedFingerprint.parse((expert.folder / FINGERPRINT).read_bytes())
        return Candidate(
            reference=str(expert.model_id),
            name=expert.name,
            fingerprint=signed.fingerprint,
            base=expert.base,
            author=Digest(signed.author.publisher.key_id),
        )

    def _directory(self, directory: Path) -> Candidate:
        with Checkpoint.open(directory) as checkpoint:
            measured = self.hashes.measure(checkpoint)
        model_id = measured.manifest.model_id
        shelved = self._shelved(str(model_id))
        path = self.folder / sha256(canonical([model_id, self.probes.digest])).hex
        fingerprint = shelved.fingerprint if shelved and self._asked(shelved.fingerprint) else _kept(path)
        if fingerprint is None or fingerprint.model_id != model_id:
            fingerprint = self._compute(directory, measured)
            self.folder.mkdir(parents=True, exist_ok=True)
            files.replace(path, fingerprint.to_bytes())
            self._drop_oldest()
        base = shelved.base if shelved else None
        return Candidate(reference=str(directory), name=directory.name, fingerprint=fingerprint, base=base)

    def _drop_oldest(self) -> None:
        entries = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for path in entries[:-MAX_KEPT]:
            path.unlink(missing_ok=True)

    def _asked(self, fingerprint: Fingerprint) -> bool:
        """Whether a fingerprint tells what the model says to our probes."""
        return fingerprint.behaviour is not None and fingerprint.behaviour.probes == self.probes.digest

    def _compute(self, directory: Path, measured: Measured) -> Fingerprint:
        with TemporaryDirectory(prefix="weft-") as folder:
            manifest, leaves = Path(folder) / "manifest.json", Path(folder) / "leaves.bin"
            manifest.write_bytes(measured.manifest.to_bytes())
            leaves.write_bytes(measured.leaves.to_bytes())
            made = self.sketch(
                Measurable(
                    model_id=measured.manifest.model_id,
                    directory=directory,
                    manifest=manifest,
                    leaves=leaves,
                )
            )
        if made.silent:
            self.silent(directory, made.silent)
        return Fingerprint.parse(made.fingerprint)


def _kept(path: Path) -> Fingerprint | None:
    """What was computed before; a file that cannot be read is as good as none."""
    with suppress(OSError, CorruptCheckpoint):
        return Fingerprint.parse(path.read_bytes())
    return None
