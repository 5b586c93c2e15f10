"""The keys of chance: what a random operator draws depends on what is merged, and on nothing else.

Every expert of every tensor has a key of its own, made from the plan's digest, where the expert's tensor
comes from and what it is merged into; an element's draw follows from the key and its index. So two people who
run one plan draw alike, whatever the order in which they compute.
"""

from __future__ import annotations

from blake3 import blake3

from merge_core.digest import Digest

_CONTEXT = "weft chance v1"


def key(plan: Digest, source: str, taken: str, made: str) -> int:
    """64 bits for the tensor `taken` of a source on its way into the tensor `made`."""
    parts = "\0".join((plan, source, taken, made)).encode()
    return int.from_bytes(blake3(parts, derive_key_context=_CONTEXT).digest(length=8), "little")
