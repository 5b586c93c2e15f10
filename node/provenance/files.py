"""Record files: lines added durably, records read only when they are plain files of bounded size."""

from __future__ import annotations

import os
from pathlib import Path

from merge_core.checkpoint.published import Survey, read_bounded
from node.errors import VerificationFailed


def append_line(path: Path, line: bytes) -> None:
    """Add one line to a file durably; a line that a crash cut off before is closed first."""
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_record(directory: Path, survey: Survey, name: str, limit: int) -> bytes:
    """Read one of our own files from a surveyed directory; raises VerificationFailed where it is missing.

    Raises CorruptCheckpoint above `limit` bytes. Links are not followed: they may lead anywhere.
    """
    if name not in survey.records or name in survey.links:
        raise VerificationFailed(f"{name} is missing", hint="weft add DIR signs a model")
    return read_bounded(directory / name, limit)
