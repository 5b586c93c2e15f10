"""Small files: whole or not at all, as private as asked, and never through another name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from merge_core import files


def test_a_file_is_replaced_and_its_other_names_keep_the_old_bytes(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    files.replace(path, b"old")
    other.hardlink_to(path)
    files.replace(path, b"new", mode=0o600)
    assert (path.read_bytes(), other.read_bytes()) == (b"new", b"old")
    assert path.stat().st_mode & 0o777 == 0o600 and other.stat().st_mode & 0o777 == 0o644
    assert sorted(tmp_path.iterdir()) == [path, other]


def test_a_disk_that_fails_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    files.replace(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        files.replace(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_new_file_takes_no_place_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        files.create(tmp_path / "a", b"x")
    assert not (tmp_path / "elsewhere").exists()
    files.create(tmp_path / "b", b"x", mode=0o600)
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o600


def test_a_name_as_long_as_the_disk_takes_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    files.replace(path, b"y")
    assert path.read_bytes() == b"y"


def test_a_folder_may_be_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files.replace(tmp_path / "link" / "a", b"x")
    assert (tmp_path / "real" / "a").read_bytes() == b"x"
