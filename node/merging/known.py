"""Where models were seen on this machine: a hint that spares asking, and is checked by whoever follows it.

One small file per ModelId holds a directory's path, below the cache folder; it may be deleted at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from merge_core.digest import ModelId
from node.home import write_private


class KnownPlaces:
    """The hints in one folder, behind the shelf, which knows better."""

    def __init__(self, folder: Path, on_shelf: Callable[[ModelId], Path | None]) -> None:
        self._folder = folder
        self._on_shelf = on_shelf

    def find(self, model_id: ModelId) -> Path | None:
        """A directory that held this model when it was last looked at."""
        held = self._on_shelf(model_id)
        if held is not None:
            return held
        with suppress(OSError, UnicodeDecodeError):
            path = Path((self._folder / model_id.hex).read_text())
            return path if path.is_dir() else None
        return None

    def remember(self, model_id: ModelId, directory: Path) -> None:
        """Keep a hint; a full disk is no reason to fail."""
        with suppress(OSError):
            write_private(self._folder / model_id.hex, str(directory).encode())
