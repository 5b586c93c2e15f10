"""A directory under construction: verify, then write, then journal; renamed into place when whole.

    .NAME.partial/files      the model directory to be, weight files preallocated
    .NAME.partial/journal    the layout's digest, then the number of each verified leaf (4 bytes each)

Nothing that did not verify is ever written. A resumed run re-hashes what the journal claims. Each file's
SHA-256 runs along behind the leaves that have arrived in a row, so that it is known soon after the last.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from merge_core import files
from merge_core.checkpoint import merkle
from merge_core.checkpoint.reader import Checkpoint
from merge_core.digest import Digest
from merge_core.errors import CorruptCheckpoint
from merge_core.flushing import Flusher
from node.errors import LimitReached, LocalError
from node.exchange.blueprint import Blueprint, Leaf

_NUMBER = struct.Struct("<I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvage:
    """Where a verified tensor lies that was written under another layout."""

    path: Path
    offset: int


class Partial:
    """One directory under construction, held by one process; `accept` may run in several threads."""

    def __init__(self, destination: Path, blueprint: Blueprint) -> None:
        self.destination = destination
        self._blueprint = blueprint
        self._folder = folder_of(destination)
        self._files = self._folder / "files"
        self._weights: dict[str, _Weights] = {}
        self._journal = -1
        self._flusher = Flusher()
        self.verified: set[int] = set()

    @classmethod
    def open(cls, destination: Path, blueprint: Blueprint) -> Partial:
        """Go on with what lies there under the same layout, else begin anew.

        Raises LocalError when the destination exists or another process is at it, LimitReached when the
        disk cannot take the files (then nothing is left behind).
        """
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise LocalError(f"{destination} exists already", hint=f"rm -r {destination}, then again")
        partial = cls(destination, blueprint)
        with _disk_errors(destination):
            partial._files.mkdir(parents=True, exist_ok=True)
            partial._lock()
        try:
            with _disk_errors(destination):
                claimed = partial._begin()
            partial._recheck(claimed)
        except LimitReached:
            partial.discard()
            raise
        except BaseException:
            partial.close()
            raise
        return partial

    def accept(self, leaf: Leaf, data: bytes) -> bool:
        """Write one leaf if it verifies, and say whether it did; raises LimitReached on a full disk."""
        if len(data) != leaf.size or merkle.leaf_digest(data) != leaf.digest:
            return False
        with _disk_errors(self.destination):
            self._weights[leaf.path].write(leaf, data)
            os.write(self._journal, _NUMBER.pack(leaf.number))
        self.verified.add(leaf.number)
        self._weights[leaf.path].advance(self.verified)
        return True

    def changed_files(self) -> tuple[str, ...]:
        """The weight files whose SHA-256 is not the signed one, once all leaves are there."""
        for file in self._weights.values():
            file.advance(self.verified)
        return tuple(
            file.path for file in self._blueprint.weights if self._weights[file.path].digest() != file.sha256
        )

    def commit(self) -> None:
        """Sync everything and rename it into place; nothing of the partial directory is left.

        Raises CorruptCheckpoint, and leaves nothing, when what the publisher signed is no checkpoint.
        """
        with _disk_errors(self.destination):
            for name, data in self._blueprint.small.items():
                files.replace(self._files / name, data)
        try:
            Checkpoint.open(self._files).close()
        except CorruptCheckpoint:
            self.discard()
            raise
        with _disk_errors(self.destination):
            self._flusher.close()
            for weights in self._weights.values():
                weights.sync()
            files.sync(self._files)
            self._files.replace(self.destination)
            files.sync(self.destination.parent)
        self.discard()

    def set_aside(self) -> dict[str, Salvage]:
        """Give up the layout but keep the bytes: where every whole tensor lies now, by content root."""
        aside = aside_of(self.destination)
        self.close()
        shutil.rmtree(aside, ignore_errors=True)
        self._folder.replace(aside)
        whole: dict[str, Salvage] = {}
        for those in self._blueprint.by_tensor().values():
            if all(leaf.number in self.verified for leaf in those):
                root = merkle.content_root([leaf.digest for leaf in those]).hex()
                whole[root] = Salvage(path=aside / "files" / those[0].path, offset=those[0].offset)
        return whole

    def discard(self) -> None:
        """Remove whatever is not in place."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let go; what was verified stays for another run."""
        with suppress(OSError):  # what matters has been synced by `commit`, which does not pass over errors
            self._flusher.close()
        for weights in self._weights.values():
            weights.close()
        self._weights.clear()
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def _lock(self) -> None:
        self._journal = os.open(
            self._folder / "journal", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
        )
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise LocalError(f"another fetch is writing {self.destination}", hint="weft jobs") from error

    def _begin(self) -> set[int]:
        """Open the files, and return the leaves that the journal claims for this layout."""
        head = self._blueprint.digest.hex.encode() + b"\n"
        recorded = os.pread(self._journal, os.fstat(self._journal).st_size, 0)
        if not recorded.startswith(head):
            shutil.rmtree(self._files)
            self._files.mkdir()
            os.ftruncate(self._journal, 0)
            os.write(self._journal, head)
            recorded = head
        body = recorded[len(head) :]
        os.ftruncate(self._journal, len(recorded) - len(body) % _NUMBER.size)
        leaves: dict[str, list[Leaf]] = {file.path: [] for file in self._blueprint.weights}
        for leaf in self._blueprint.leaves:
            leaves[leaf.path].append(leaf)
        for file in self._blueprint.weights:
            self._weights[file.path] = _Weights(
                self._files / file.path, file.size, file.header, leaves[file.path], self._flusher
            )
        return {number for (number,) in _NUMBER.iter_unpack(body[: len(body) // 4 * 4])}

    def _recheck(self, claimed: set[int]) -> None:
        for leaf in self._blueprint.leaves:
            if leaf.number in claimed:
                weights = self._weights[leaf.path]
                if merkle.leaf_digest(weights.read(leaf)) == leaf.digest:
                    self.verified.add(leaf.number)
        for weights in self._weights.values():
            weights.advance(self.verified)


class _Weights:
    """One preallocated weight file and the running SHA-256 of what has arrived in a row."""

    def __init__(self, path: Path, size: int, header: bytes, leaves: list[Leaf], flusher: Flusher) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        os.posix_fallocate(self._fd, 0, size)
        os.pwrite(self._fd, header, 0)
        self._leaves = leaves
        self._next = 0
        self._sha256 = hashlib.sha256(header)
        self._lock = threading.Lock()
        self._flusher = flusher

    def write(self, leaf: Leaf, data: bytes) -> None:
        os.pwrite(self._fd, data, leaf.offset)
        self._flusher.wrote(self._fd, len(data))

    def read(self, leaf: Leaf) -> bytes:
        return os.pread(self._fd, leaf.size, leaf.offset)

    def advance(self, verified: set[int]) -> None:
        """Hash on as far as leaves have arrived in a row, unless another thread is at it."""
        while self._ready(verified) and self._lock.acquire(blocking=False):
            try:
                while self._ready(verified):
                    self._sha256.update(self.read(self._leaves[self._next]))
                    self._next += 1
            finally:
                self._lock.release()

    def _ready(self, verified: set[int]) -> bool:
        return self._next < len(self._leaves) and self._leaves[self._next].number in verified

    def digest(self) -> Digest:
        return Digest("sha256:" + self._sha256.hexdigest())

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def folder_of(destination: Path) -> Path:
    """Where a fetch to `destination` is under construction."""
    return destination.parent / f".{destination.name}.partial"


def aside_of(destination: Path) -> Path:
    """Where the bytes of a layout that turned out a lie wait to be copied from."""
    return destination.parent / f".{destination.name}.aside"


@contextmanager
def _disk_errors(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise LimitReached(
                f"no room for {destination.name}: {error.strerror}", hint=f"df -h {destination.parent}"
            ) from error
        raise LocalError(
            f"cannot write {destination}: {error.strerror}", hint=f"ls -ld {destination.parent}"
        ) from error
