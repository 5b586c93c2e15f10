"""The tensors that need not be fetched: equal bytes lie on this machine already.

The search is by content root, so a tensor is found whatever it is called and whichever model it belongs to.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from merge_core.checkpoint import merkle
from merge_core.errors import CorruptCheckpoint
from node.exchange.blueprint import Leaf
from node.exchange.holder import LocalContent, Place
from node.exchange.partial import Partial

log = logging.getLogger(__name__)


class LocalTensors:
    """First what a dropped layout left, then what the node has."""

    def __init__(self, aside: Mapping[str, Place], have: LocalContent | None) -> None:
        self._aside = aside
        self._have = have

    def find(self, leaves: Sequence[Leaf]) -> Place | None:
        """Where the tensor of these leaves, which are all it has, should lie (blocking).

        A local model that cannot be read is one that does not help: its tensors are fetched.
        """
        root = merkle.content_root([leaf.digest for leaf in leaves]).hex()
        if root in self._aside:
            return self._aside[root]
        try:
            return self._have.locate(root, sum(leaf.size for leaf in leaves)) if self._have else None
        except (OSError, CorruptCheckpoint) as error:
            log.warning("a local model cannot be read: %s", error)
            return None


def copy(partial: Partial, leaves: Sequence[Leaf], place: Place) -> int:
    """Take over leaves of one tensor as far as they verify; return how many bytes that were."""
    copied = 0
    try:
        with place.path.open("rb", buffering=0) as file:
            for leaf in leaves:
                file.seek(place.offset + leaf.begin)
                if partial.accept(leaf, file.read(leaf.size)):
                    copied += leaf.size
    except OSError:
        return copied  # moved or removed since it was indexed: what is missing is fetched
    return copied
