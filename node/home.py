"""Home: where a node keeps what is its own (`WEFT_HOME`, by default the platform's data folder).

config.toml          settings
identity/            keys and binding, 0600: the part to back up
node.db              adverts, agreements, jobs, records (SQLite)
experts/             the shelf: one folder per model and publisher
token                what the control API asks for, 0600
run/node.json        process id and control address of the node that runs
cache/               digests of files hashed before, fingerprints of others; safe to delete
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from merge_core import files
from node.errors import LocalError


@dataclass(frozen=True, slots=True)
class Home:
    """The paths under one root; nothing is created by looking."""

    root: Path

    @classmethod
    def default(cls) -> Home:
        """`$WEFT_HOME`, else the platform's folder for application data."""
        return cls(Path(os.environ.get("WEFT_HOME") or platformdirs.user_data_dir("weft")).absolute())

    def make(self) -> Home:
        """Create the root for its owner alone; raises LocalError as `checked` does."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self.checked()

    def checked(self) -> Home:
        """This home, unless others can put another identity or policy in place: then LocalError."""
        if self.root.is_dir() and self.root.stat().st_mode & 0o022:
            raise LocalError(f"{self.root} can be written to by others", hint=f"chmod 700 {self.root}")
        return self

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def identity(self) -> Path:
        return self.root / "identity"

    @property
    def database(self) -> Path:
        return self.root / "node.db"

    @property
    def experts(self) -> Path:
        return self.root / "experts"

    @property
    def parents(self) -> Path:
        return self.root / "parents"

    @property
    def claims(self) -> Path:
        return self.root / "claims.jsonl"

    @property
    def incoming(self) -> Path:
        """Where a fetch builds up: the same file system as the shelf, so that it is renamed into place."""
        return self.root / "incoming"

    @property
    def policy(self) -> Path:
        return self.root / "policy.toml"

    @property
    def token(self) -> Path:
        return self.root / "token"

    @property
    def run(self) -> Path:
        return self.root / "run" / "node.json"

    @property
    def lock(self) -> Path:
        return self.root / "run" / "lock"

    @property
    def log(self) -> Path:
        return self.root / "run" / "node.log"

    @property
    def fingerprints(self) -> Path:
        """Fingerprints of others, by digest."""
        return self.cache / "fingerprints"

    @property
    def measured(self) -> Path:
        """Fingerprints of directories that are not on the shelf."""
        return self.cache / "measured"

    @property
    def cache(self) -> Path:
        return self.root / "cache"


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    files.replace(path, data, mode=0o600)
