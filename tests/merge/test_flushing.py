"""Flushing early: nothing of what the disk says is lost on the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from merge_core.flushing import FLUSH_EVERY, Flusher


def test_an_error_of_the_disk_is_told_by_the_next_call(tmp_path: Path) -> None:
    flusher = Flusher()
    flusher.wrote(1 << 20, FLUSH_EVERY)  # no such descriptor: an error like any other
    with pytest.raises(OSError, match="Bad file descriptor"):
        flusher.close()
    flusher.close()


def test_little_is_not_worth_a_flush(tmp_path: Path) -> None:
    flusher = Flusher()
    flusher.wrote(1 << 20, FLUSH_EVERY - 1)
    flusher.close()


def test_what_was_written_is_flushed_once_in_a_while(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    flusher = Flusher()
    for _ in range(10):
        flusher.wrote(descriptor, FLUSH_EVERY // 2)
    flusher.close()
    os.close(descriptor)
