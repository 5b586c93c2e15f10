"""The Hugging Face cache on this machine: where `org/name` lies, if it was ever downloaded here.

Its layout is read as it is; nothing is asked of anybody and nothing is written:

    models--org--name/refs/main             a commit
    models--org--name/snapshots/<commit>/   the files, as links to what is shared between commits
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_NAME = r"(?!\.)(?!.*(?:--|\.\.))[A-Za-z0-9._-]{1,96}"
_REPOSITORY = re.compile(rf"{_NAME}/{_NAME}")
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MODELS = "models--"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    """A model on the hub: `org/name`, and the branch, tag or commit that is meant."""

    repository: str
    revision: str = "main"

    @property
    def download(self) -> str:
        """The command that brings it here."""
        at = "" if self.revision == "main" else f" --revision {self.revision}"
        return f"hf download {self.repository}{at}"


def parse(text: str) -> HubModel | None:
    """Read `org/name` or `org/name@revision`; None for whatever is no such id."""
    repository, at, revision = text.partition("@")
    if not _REPOSITORY.fullmatch(repository) or (at and not _REVISION.fullmatch(revision)):
        return None
    return HubModel(repository=repository, revision=revision) if at else HubModel(repository=repository)


def find(model: HubModel) -> Path | None:
    """The directory of a model that was downloaded, None where it was not."""
    home = _cache() / f"{_MODELS}{model.repository.replace('/', '--')}"
    commit = model.revision
    if not _COMMIT.fullmatch(commit):
        try:
            with (home / "refs" / commit).open() as file:
                commit = file.read(64).strip()
        except (OSError, UnicodeDecodeError):
            return None
        if not _COMMIT.fullmatch(commit):
            return None
    directory = home / "snapshots" / commit
    return directory if directory.is_dir() else None


def origin(directory: Path) -> HubModel | None:
    """The model, by commit, whose place in a cache a directory is; None for any other directory."""
    commit, snapshots, home = directory.name, directory.parent, directory.parent.parent
    repository = home.name.removeprefix(_MODELS).replace("--", "/")
    placed = snapshots.name == "snapshots" and home.name.startswith(_MODELS) and _COMMIT.fullmatch(commit)
    if not placed or not _REPOSITORY.fullmatch(repository):
        return None
    return HubModel(repository=repository, revision=commit)


def _cache() -> Path:
    """The folder that Hugging Face's own tools use, by the same variables in the same order."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(home).expanduser() / "hub"
