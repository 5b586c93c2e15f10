"""Whether a fetch ended here before: the same files as the publisher signed, hashed anew."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from merge_core.digest import Digest, sha256
from node.errors import LocalError
from node.exchange.blueprint import Blueprint
from node.exchange.partial import folder_of


def is_whole(destination: Path, blueprint: Blueprint) -> bool:
    """Say whether exactly the files of a blueprint lie at a place, and nothing is there half done (blocking).

    False where nothing lies; raises LocalError where it cannot be read.
    """
    expected = {name: sha256(data) for name, data in blueprint.small.items()}
    expected |= {file.path: file.sha256 for file in blueprint.weights}
    try:
        if not destination.is_dir() or {path.name for path in destination.iterdir()} != expected.keys():
            return False
        whole = all(_sha256_of(destination / name) == digest for name, digest in expected.items())
    except OSError as error:
        raise LocalError(f"cannot read {destination}: {error}", hint=f"ls -l {destination}") from error
    if whole:  # a crash after the rename left the empty shell of the construction
        shutil.rmtree(folder_of(destination), ignore_errors=True)
    return whole


def _sha256_of(path: Path) -> Digest:
    with path.open("rb") as file:
        return Digest("sha256:" + hashlib.file_digest(file, "sha256").hexdigest())
