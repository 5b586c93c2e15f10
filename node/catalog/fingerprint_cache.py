"""FingerprintCache: signed fingerprints and minis of others, by digest, so that each is asked for once.

Whatever lies here can be passed on: its digest says what it is. The folder is bounded, those that were not
used for longest go first, and it may be deleted at any time.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from merge_core.digest import Digest, sha256

ROOM = 256 << 20
"""Bytes on the disk, a thousand fingerprints; each file counts for LEAST at least."""
LEAST = 4 << 10


class FingerprintCache:
    """One file per digest; usable from every thread."""

    def __init__(self, folder: Path, *, room: int = ROOM) -> None:
        self._folder = folder
        self._room = room
        self._lock = threading.Lock()
        self._used: int | None = None

    def get(self, digest: Digest, *, limit: int) -> bytes | None:
        """What has this digest and at most `limit` bytes; a file that was damaged is removed."""
        path = self._folder / digest.hex
        try:
            if path.stat().st_size > limit:
                return None
            data = path.read_bytes()
        except OSError:
            return None
        if sha256(data) != digest:
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):
            os.utime(path)
        return data

    def put(self, data: bytes) -> None:
        """Keep something; a full disk is no reason to fail."""
        path = self._folder / sha256(data).hex
        with self._lock, suppress(OSError):
            if path.exists():
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            before = self._measure() if self._used is None else self._used
            # Not synced: what a power cut leaves of it does not have its digest.
            partial = self._folder / f".{os.getpid()}"
            partial.write_bytes(data)
            partial.replace(path)
            used = before + _cost(len(data))
            self._used = used if used <= self._room else self._make_room()

    def _measure(self) -> int:
        return sum(_cost(entry.stat().st_size) for entry in os.scandir(self._folder))

    def _make_room(self) -> int:
        """Remove the longest unused until nine tenths are left; what is used then."""
        found = sorted(
            (entry.stat().st_mtime_ns, entry.path, _cost(entry.stat().st_size))
            for entry in os.scandir(self._folder)
        )
        used = sum(cost for _, _, cost in found)
        for _, path, cost in found:
            if used <= self._room * 9 // 10:
                break
            Path(path).unlink(missing_ok=True)
            used -= cost
        return used


def _cost(size: int) -> int:
    return max(size, LEAST)
