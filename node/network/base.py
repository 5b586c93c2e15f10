"""The network port: requests, gossip and peer events between nodes, whoever carries them.

Rules that both implementations keep:
- a message is at most MAX_MESSAGE bytes in either direction; more is refused before it is read;
- every wait has a deadline in seconds from now; a peer that misses it is Unreachable;
- a handler that raises Refused is answered with its reason and sentence, and `request` raises the same
  Refused on the other side; any other error stays in the log and travels as "failed", without its text;
- gossip is flooded to everybody on a topic; each message is rate limited per peer, then validated, then
  delivered in order, at most once; one's own messages are not delivered to oneself;
- callbacks run on the event loop that called `start`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum, IntEnum
from types import TracebackType
from typing import Protocol, Self

import anyio

from node.domain import text
from node.domain.address import Address
from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import LimitReached, LocalError, PeerError, Refused, Unreachable

MAX_MESSAGE = 64 * 1024
"""Bytes of a request, of a reply's body, and of a gossip message."""

MAX_FRAME = MAX_MESSAGE + 1
"""Bytes of a reply on the wire: its status and its body."""

MAX_DETAIL = 1024
"""Bytes of UTF-8 that a refusal may say."""

HANDLER_DEADLINE = 30.0
"""Seconds after which a handler is cancelled and its peer told that we are busy."""

log = logging.getLogger(__name__)


class Verdict(Enum):
    """What a validator thinks of a gossip message."""

    ACCEPT = "accept"
    """Deliver it and pass it on."""
    IGNORE = "ignore"
    """Neither deliver nor pass it on, but nobody is to blame (old, already known)."""
    REJECT = "reject"
    """Its forwarder should have known better: counts against it."""


class Direction(Enum):
    """Who dialled."""

    INBOUND = "inbound"
    OUTBOUND = "outbound"


class Change(Enum):
    """What happened to a peer."""

    CONNECTED = "connected"
    JOINED = "joined"
    """It is connected and subscribes to one of our topics: what we publish now reaches it."""
    DISCONNECTED = "disconnected"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerEvent:
    """One change of one peer; CONNECTED and DISCONNECTED alternate for each peer."""

    peer: PeerId
    change: Change


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerInfo:
    """A connected peer; `latency` is the last round trip of a ping in seconds, None before the first."""

    peer: PeerId
    addresses: tuple[str, ...]
    direction: Direction
    latency: float | None


Handler = Callable[[PeerId, bytes], Awaitable[bytes]]
Validate = Callable[[PeerId, bytes], Verdict]
Deliver = Callable[[PeerId, bytes], Awaitable[None]]
OnPeer = Callable[[PeerEvent], None]


class Network(Protocol):
    """A node's view of the network; `start` and `stop` may each be called again without harm."""

    @property
    def peer_id(self) -> PeerId:
        """Who we are."""

    async def start(self) -> None:
        """Listen; raises LocalError when the port is taken."""

    async def stop(self) -> None:
        """Close every connection and listener, cancel every running handler, then return."""

    async def __aenter__(self) -> Self:
        """Start."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop."""

    def addresses(self) -> tuple[str, ...]:
        """Complete multiaddrs under which others can dial us: never a wildcard, none when stopped."""

    async def connect(self, address: str, *, deadline: float = 10.0) -> PeerId:
        """Dial a complete multiaddr, or keep the connection that there is.

        Raises Unreachable when nobody answers, PeerError when somebody else than the named peer does,
        LocalError when the address is malformed or our own.
        """

    async def disconnect(self, peer: PeerId) -> None:
        """Close the connection to a peer, if there is one."""

    def peers(self) -> tuple[PeerInfo, ...]:
        """The connected peers, ordered by peer id."""

    async def ping(self, peer: PeerId, *, deadline: float = 5.0) -> float:
        """Measure the round trip to a connected peer in seconds; raises Unreachable."""

    def handle(self, protocol: str, handler: Handler) -> None:
        """Answer requests of a protocol (`/weft/negotiate/1`) with a handler, also after a restart."""

    async def request(self, peer: PeerId, protocol: str, payload: bytes, *, deadline: float) -> bytes:
        """Ask a connected peer and return its answer within `deadline` seconds.

        Raises Refused as the peer's handler did; Unreachable when it is not connected, is late or failed;
        PeerError when it does not speak the protocol or its answer is malformed or too large;
        LimitReached when the payload is over MAX_MESSAGE.
        """

    async def publish(self, topic: str, data: bytes) -> int:
        """Send to everybody on a topic we subscribe to; return how many neighbours are on it now.

        Raises LimitReached over MAX_MESSAGE, and LocalError when our own validator rejects the message:
        our neighbours would too, and blame us.
        """

    def subscribe(self, topic: str, validate: Validate, deliver: Deliver) -> None:
        """Join a topic, also after a restart; one subscription per topic.

        `validate` gets the author (proven by its signature, not the neighbour that passed it on) and must
        be quick; `deliver` runs for accepted messages, one after the other.
        """

    def on_peer(self, listener: OnPeer) -> None:
        """Call `listener` at each change of a peer."""


def parse_address(address: str) -> Address:
    """Read a complete TCP multiaddr; raises LocalError on anything else."""
    try:
        return Address.parse(address)
    except ValueError as error:
        raise LocalError(str(error), hint="ask the other node for its address: weft invite") from error


class Status(IntEnum):
    """The first byte of a reply."""

    OK = 0
    """The rest is the handler's answer."""
    REFUSED = 1
    """The rest is one byte of Reason and a sentence in UTF-8."""
    FAILED = 2
    """The handler failed; nothing follows."""


def check_size(payload: bytes) -> None:
    """Refuse to send what every peer would refuse to read."""
    if len(payload) > MAX_MESSAGE:
        raise LimitReached(f"a message of {len(payload)} bytes is over the limit of {MAX_MESSAGE}")


def encode_answer(body: bytes) -> bytes:
    """Frame a handler's answer; raises LimitReached over MAX_MESSAGE."""
    check_size(body)
    return bytes((Status.OK,)) + body


def encode_refusal(refused: Refused) -> bytes:
    """Frame a refusal: its reason and as much of its detail as fits."""
    detail = refused.detail.encode("utf-8", "replace")[:MAX_DETAIL]
    return bytes((Status.REFUSED, refused.reason)) + detail


def encode_failure() -> bytes:
    """Frame a failure without a word about it: its text may hold paths or secrets."""
    return bytes((Status.FAILED,))


def decode_reply(frame: bytes) -> bytes:
    """Return the body of an answer; raises Refused, Unreachable (it failed) or PeerError (malformed)."""
    if not frame or len(frame) > MAX_FRAME:
        raise PeerError(f"a reply of {len(frame)} bytes is malformed")
    status, body = frame[0], frame[1:]
    if status == Status.OK:
        return body
    if status == Status.FAILED and not body:
        raise Unreachable("the peer failed while it answered", hint="try again later, or ask another peer")
    if status == Status.REFUSED and 1 <= len(body) <= 1 + MAX_DETAIL:
        raise Refused(_reason(body[0]), text.printable(body[1:].decode("utf-8", "replace")))
    raise PeerError("the peer's reply is malformed")


def _reason(number: int) -> Reason:
    """The reason of that number; a newer peer may know more of them than we do."""
    try:
        return Reason(number)
    except ValueError:
        return Reason.UNSPECIFIED


async def answer(
    handler: Handler, peer: PeerId, payload: bytes, *, deadline: float = HANDLER_DEADLINE
) -> bytes:
    """Run a handler and frame what came of it; raises nothing but cancellation."""
    try:
        with anyio.fail_after(deadline):
            return encode_answer(await handler(peer, payload))
    except Refused as refused:
        return encode_refusal(refused)
    except TimeoutError:
        log.warning("a handler took over %.0f s for peer %s", deadline, peer.short)
        return encode_refusal(Refused(Reason.BUSY, "the answer took too long"))
    except Exception:
        log.exception("a handler failed for peer %s", peer.short)
        return encode_failure()
