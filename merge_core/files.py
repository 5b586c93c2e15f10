"""Small files on the disk: whole or not at all, and still there after a power cut."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def replace(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Put `data` at `path` at once and durably; what lay there, also under other names, stays as it was."""
    descriptor, partial = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    try:
        _fill(descriptor, data, mode)
        Path(partial).replace(path)
        sync(path.parent)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def create(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a new file durably into a folder that is not in place yet; raises FileExistsError.

    The caller syncs the folder once, when everything is in it.
    """
    _fill(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), data, mode)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fill(descriptor: int, data: bytes, mode: int) -> None:
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(data)
        file.flush()
        os.fsync(descriptor)
