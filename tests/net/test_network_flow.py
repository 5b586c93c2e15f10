"""What one peer may ask of us at once, in numbers; and the framing of replies from peers that lie."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import LocalError, PeerError, Refused, Unreachable, WeftError
from node.identity.keys import HostKey
from node.network.base import (
    MAX_FRAME,
    MAX_MESSAGE,
    Verdict,
    decode_reply,
    encode_answer,
    encode_failure,
    encode_refusal,
    parse_address,
)
from node.network.flow import Admission, Gate, Limits, Slots
from node.network.memory import Fabric, MemoryNetwork
from node.network.upkeep import LONGEST_DELAY, delay_after, stay_connected, watch_peers

ALICE, BOB, CAROL = (HostKey.generate().peer_id for _ in range(3))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# -- buckets ---------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 5), max_size=60))
def test_no_more_than_burst_and_rate_allow(waits: list[float]) -> None:
    gate, now, admitted = Gate(rate=2.0, burst=5.0, debt=10.0), 100.0, 0
    for wait in waits:
        now += wait
        admitted += gate.admit(ALICE, now) is Admission.ADMIT
    assert admitted <= 5 + 2 * sum(waits) + 1e-6


def test_a_peer_that_keeps_flooding_stays_out_until_it_has_been_silent() -> None:
    gate = Gate(rate=1.0, burst=2.0, debt=3.0)
    seen = [gate.admit(ALICE, 0.0) for _ in range(6)]
    admit, drop, flood = Admission.ADMIT, Admission.DROP, Admission.FLOOD
    assert seen == [admit, admit, drop, drop, flood, flood]
    assert gate.admit(BOB, 0.0) is admit
    assert gate.admit(ALICE, 3.5) is drop
    assert gate.admit(ALICE, 5.0) is admit


def test_only_so_many_peers_are_remembered() -> None:
    gate = Gate(rate=1.0, burst=1.0, debt=1.0, peers=2)
    for peer in (ALICE, BOB, CAROL):
        gate.admit(peer, 0.0)
    assert len(gate) == 2


def test_time_that_runs_backwards_gives_no_tokens() -> None:
    gate = Gate(rate=10.0, burst=1.0, debt=1.0)
    assert gate.admit(ALICE, 10.0) is Admission.ADMIT
    assert gate.admit(ALICE, 5.0) is not Admission.ADMIT
    assert gate.admit(ALICE, 5.0) is not Admission.ADMIT


def test_slots_come_back_also_after_an_error() -> None:
    slots = Slots(total=2, per_peer=1)
    with slots.taken(ALICE):
        with pytest.raises(Refused) as caught, slots.taken(ALICE):
            pass
        assert caught.value.reason is Reason.BUSY
        with slots.taken(BOB), pytest.raises(Refused), slots.taken(CAROL):
            pass
    with pytest.raises(KeyError), slots.taken(ALICE):
        raise KeyError
    with slots.taken(ALICE):
        pass


# -- framing ---------------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_an_answer_comes_back_as_it_was(body: bytes) -> None:
    assert decode_reply(encode_answer(body)) == body


@given(
    st.sampled_from(Reason),
    st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp", "Zs", "Cn", "Co"])),
)
def test_a_refusal_comes_back_as_it_was(reason: Reason, detail: str) -> None:
    with pytest.raises(Refused) as caught:
        decode_reply(encode_refusal(Refused(reason, detail)))
    assert (caught.value.reason, caught.value.detail) == (reason, detail)


@given(st.binary(max_size=3000))
def test_any_bytes_are_an_answer_or_a_typed_error(frame: bytes) -> None:
    try:
        assert decode_reply(frame) == frame[1:]
    except (PeerError, Refused, Unreachable) as error:
        assert str(error)


@pytest.mark.parametrize("frame", [b"", b"\x03", b"\xff123", b"\x01", b"\x02x", bytes(MAX_FRAME + 1)])
def test_a_malformed_reply_is_the_peers_fault(frame: bytes) -> None:
    with pytest.raises(PeerError):
        decode_reply(frame)


def test_a_reason_that_we_do_not_know_yet_is_a_refusal_all_the_same() -> None:
    with pytest.raises(Refused) as caught:
        decode_reply(b"\x01\xf0later")
    assert (caught.value.reason, caught.value.detail) == (Reason.UNSPECIFIED, "later")


def test_a_refusal_cannot_steer_the_terminal() -> None:
    with pytest.raises(Refused) as caught:
        decode_reply(encode_refusal(Refused(Reason.BUSY, "\x1b[2Jgone\r\n")))
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_failure_says_nothing_else() -> None:
    assert len(encode_failure()) == 1
    with pytest.raises(Unreachable):
        decode_reply(encode_failure())


def test_a_long_detail_is_cut() -> None:
    assert len(encode_refusal(Refused(Reason.BUSY, "é" * MAX_MESSAGE))) <= 2048


# -- addresses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transport", ["/ip4/192.0.2.7/tcp/4001", "/ip6/2001:db8::1/tcp/1", "/dns4/a.example/tcp/9"]
)
def test_an_address_reads_back(transport: str) -> None:
    address = parse_address(f"{transport}/p2p/{ALICE}")
    assert (address.transport, address.peer) == (transport, ALICE)
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/1.2.3.4/udp/1/quic-v1",
        "/ip4/1.2.3.4/tcp/0",
        "/ip4/1.2.3.4/tcp/70000",
        "/ip4/1.2.3.400/tcp/7",
        "x" * 500,
    ],
)
def test_other_addresses_are_malformed(text: str) -> None:
    with pytest.raises(LocalError) as caught:
        parse_address(f"{text}/p2p/{ALICE}")
    assert "weft" in caught.value.hint


# -- upkeep ----------------------------------------------------------------------------------------------


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_backoff_grows_to_a_bound(failures: int, jitter: float) -> None:
    assert 0.5 <= delay_after(failures, jitter) <= LONGEST_DELAY
    assert delay_after(failures, jitter) <= delay_after(failures + 1, jitter)


class Ticks:
    """A sleep that lasts until the test says that the time is over."""

    def __init__(self) -> None:
        self.asleep = asyncio.Queue[asyncio.Event]()

    async def sleep(self, seconds: float) -> None:
        event = asyncio.Event()
        self.asleep.put_nowait(event)
        await event.wait()

    async def tick(self) -> None:
        """Let one round happen, and wait until the next sleep."""
        (await self.asleep.get()).set()
        self.asleep.put_nowait(await asyncio.wait_for(self.asleep.get(), 5))


@pytest.mark.anyio
async def test_a_silent_peer_is_disconnected_after_several_missed_pings() -> None:
    fabric, ticks = Fabric(), Ticks()
    async with MemoryNetwork(fabric, ALICE) as alice, MemoryNetwork(fabric, BOB) as bob:
        await alice.connect(bob.addresses()[0])
        watching = asyncio.create_task(watch_peers(alice, Limits(ping_misses=2), sleep=ticks.sleep))
        await ticks.tick()
        assert alice.peers()[0].latency is not None
        fabric.freeze(bob)
        await ticks.tick()
        fabric.thaw(bob)
        await ticks.tick()
        fabric.freeze(bob)
        await ticks.tick()
        assert [info.peer for info in alice.peers()] == [BOB], "one missed ping in a row is no silence"
        await ticks.tick()
        assert alice.peers() == ()
        watching.cancel()


@pytest.mark.anyio
async def test_a_malformed_bootstrap_address_is_reported_at_once() -> None:
    network = MemoryNetwork(Fabric(), ALICE)
    with pytest.raises(LocalError):
        await stay_connected(network, ["/ip4/127.0.0.1/tcp/1"])


@pytest.mark.anyio
async def test_a_bootstrap_peer_with_another_identity_does_not_stop_the_others() -> None:
    fabric = Fabric()
    connected = asyncio.Event()
    async with MemoryNetwork(fabric, ALICE) as alice, MemoryNetwork(fabric, BOB) as bob:
        bob.on_peer(lambda event: connected.set())
        wrong = f"{parse_address(bob.addresses()[0]).transport}/p2p/{CAROL}"
        keeping = asyncio.create_task(stay_connected(alice, [wrong, *bob.addresses()]))
        await asyncio.wait_for(connected.wait(), 5)
        assert not keeping.done()
        keeping.cancel()


# -- the fabric ------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_partition_cuts_and_a_heal_lets_dial_again() -> None:
    fabric = Fabric()
    async with MemoryNetwork(fabric, ALICE) as alice, MemoryNetwork(fabric, BOB) as bob:
        await alice.connect(bob.addresses()[0])
        fabric.partition([alice], [bob])
        assert alice.peers() == bob.peers() == ()
        with pytest.raises(Unreachable):
            await alice.connect(bob.addresses()[0])
        fabric.heal()
        await alice.connect(bob.addresses()[0])
        assert [info.peer for info in bob.peers()] == [ALICE]


async def _losses(seed: int) -> list[bool]:
    fabric = Fabric(seed=seed, loss=0.3)
    lost = []

    async def echo(peer: PeerId, payload: bytes) -> bytes:
        return payload

    async with MemoryNetwork(fabric, ALICE) as alice, MemoryNetwork(fabric, BOB) as bob:
        bob.handle("/weft/echo/1", echo)
        while not alice.peers():
            try:
                await alice.connect(bob.addresses()[0])
            except Unreachable:
                lost.append(True)
        for _ in range(40):
            try:
                lost.append(await alice.request(BOB, "/weft/echo/1", b"x", deadline=1) != b"x")
            except Unreachable:
                lost.append(True)
    return lost


@pytest.mark.anyio
async def test_loss_comes_from_the_seed() -> None:
    assert await _losses(1) == await _losses(1) != await _losses(2)
    assert 0 < sum(await _losses(1)) < 40


@pytest.mark.anyio
async def test_every_raised_error_is_one_of_ours() -> None:
    async with MemoryNetwork(Fabric(), ALICE) as alice:
        alice.subscribe("topic", lambda author, data: Verdict.REJECT, lambda author, data: asyncio.sleep(0))
        for attempt in (
            alice.request(BOB, "/weft/echo/1", b"", deadline=1),
            alice.publish("topic", b""),
            alice.connect("nowhere"),
            alice.ping(BOB),
        ):
            with pytest.raises(WeftError):
                await attempt
