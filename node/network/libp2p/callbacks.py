"""What the trio thread may ask of the event loop: values and functions, so that it knows no Network."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from node.domain.ids import PeerId
from node.network.base import PeerInfo, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """The functions run on the event loop only, by way of the bridge; the two mappings may grow at any time.

    `learn`, `forget` and `crashed` are told which life of the thread they come from: one that was replaced
    may still have something to say.
    """

    handlers: Mapping[str, object]
    """By protocol; only the protocols are read."""
    topics: Mapping[str, object]
    """By topic; only the topics are read."""
    spawn: Callable[..., None]
    """Run a coroutine function as a task."""
    respond: Callable[[PeerId, str, bytes], Coroutine[Any, Any, bytes]]
    """Answer a peer's request of a protocol with a framed reply."""
    judge: Callable[[str, bytes, PeerId, bytes], Verdict]
    """Judge a gossip message: its topic, id, author and content."""
    learn: Callable[[object, PeerInfo], None]
    """Take note of a connected peer, or of what it says about itself."""
    forget: Callable[[object, PeerId], None]
    """Take note that the last connection of a peer has ended."""
    joined: Callable[[PeerId], None]
    """Take note that a peer can be reached on a topic of ours."""
    crashed: Callable[[object, BaseException | None], None]
    """Take note that the thread ended by itself."""
