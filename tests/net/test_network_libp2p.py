"""The libp2p network among hostile, silent and foreign peers, and through crashes of its own."""

import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.pb import rpc_pb2
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.stream_muxer.mplex.mplex import MPLEX_PROTOCOL_ID, Mplex
from libp2p.utils import encode_varint_prefixed
from multiaddr import Multiaddr

from node.domain.ids import PeerId
from node.errors import LocalError, PeerError, Unreachable
from node.identity.keys import HostKey
from node.network.base import MAX_MESSAGE, Change, Direction, PeerEvent, Verdict, parse_address
from node.network.flow import Limits
from node.network.libp2p import Libp2pNetwork
from node.network.libp2p.host import STREAMS_PER_PEER
from node.network.listening import concrete

pytestmark = pytest.mark.anyio

ECHO = "/weft/echo/1"
TOPIC = "weft/test/adverts"
MESHSUB = TProtocol("/meshsub/1.1.0")
SOON = 10.0
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def echo(peer: PeerId, payload: bytes) -> bytes:
    return payload


@pytest.fixture
async def network() -> AsyncIterator[Libp2pNetwork]:
    async with Libp2pNetwork(HostKey.generate().private_bytes, LOOPBACK) as network:
        network.handle(ECHO, echo)
        yield network


async def answers(network: Libp2pNetwork) -> bool:
    """Whether an honest stranger can still connect and ask."""
    async with Libp2pNetwork(HostKey.generate().private_bytes, LOOPBACK) as stranger:
        await stranger.connect(network.addresses()[0])
        return await stranger.request(network.peer_id, ECHO, b"still here", deadline=SOON) == b"still here"


class Witness:
    def __init__(self, network: Libp2pNetwork) -> None:
        self.events: asyncio.Queue[PeerEvent] = asyncio.Queue()
        network.on_peer(self.events.put_nowait)

    async def sees(self, change: Change) -> PeerId:
        async with asyncio.timeout(SOON):
            while (event := await self.events.get()).change is not change:
                pass
        return event.peer


async def as_peer(act: Callable[..., Awaitable[object]], address: str = "", **options: object) -> object:
    """Run `act(host)` as another libp2p host, connected to `address`, in a thread of its own."""

    async def live() -> object:
        host = new_host(key_pair=create_new_key_pair(), **options)
        async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
            try:
                if address:
                    with trio.fail_after(SOON):
                        await host.connect(info_from_p2p_addr(Multiaddr(address)))
                return await act(host)
            finally:
                await host.close()

    return await asyncio.to_thread(trio.run, live)


# -- who may connect -------------------------------------------------------------------------------------


def plaintext(keys: KeyPair) -> dict[TProtocol, InsecureTransport]:
    return {TProtocol(PLAINTEXT_PROTOCOL_ID): InsecureTransport(keys)}


async def _connected(host: object) -> bool:
    return True


async def test_a_default_libp2p_host_connects_but_a_plaintext_one_is_refused(network: Libp2pNetwork) -> None:
    seen = Witness(network)
    assert await as_peer(_connected, network.addresses()[0])
    await seen.sees(Change.DISCONNECTED)

    keys = create_new_key_pair()
    with pytest.raises(BaseException) as caught:
        await as_peer(_connected, network.addresses()[0], sec_opt=plaintext(keys))
    assert not isinstance(caught.value, (KeyboardInterrupt, trio.TooSlowError))
    assert seen.events.empty()
    assert await answers(network)


async def test_a_muxer_that_is_not_yamux_is_refused(network: Libp2pNetwork) -> None:
    mplex = {TProtocol(MPLEX_PROTOCOL_ID): Mplex}
    with pytest.raises(BaseException) as caught:
        await as_peer(_connected, network.addresses()[0], muxer_opt=mplex)
    assert not isinstance(caught.value, (KeyboardInterrupt, trio.TooSlowError))
    assert network.peers() == ()


async def test_we_do_not_speak_plaintext_to_others(network: Libp2pNetwork) -> None:
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    loop, done = asyncio.get_running_loop(), threading.Event()

    async def wait(host: object) -> None:
        loop.call_soon_threadsafe(address.set_result, str(host.get_addrs()[0]))  # type: ignore[attr-defined]
        await trio.to_thread.run_sync(done.wait)

    waiting = asyncio.create_task(as_peer(wait, sec_opt=plaintext(create_new_key_pair())))
    try:
        with pytest.raises((Unreachable, PeerError)):
            await network.connect(await asyncio.wait_for(address, SOON))
    finally:
        done.set()
        await waiting


# -- hostile peers ---------------------------------------------------------------------------------------


async def test_a_request_that_claims_four_gibibytes_is_cut_off(network: Libp2pNetwork) -> None:
    async def claim(host: object) -> bool:
        swarm: Swarm = host.get_network()  # type: ignore[attr-defined]
        (identity,) = swarm.connections
        for claimed in (0xFFFFFFFF, MAX_MESSAGE + 1):
            stream = await host.new_stream(identity, [TProtocol(ECHO)])  # type: ignore[attr-defined]
            await stream.write(claimed.to_bytes(4, "big") + bytes(1000))
            with trio.fail_after(SOON):
                try:
                    if await stream.read(4):
                        return False
                except Exception:  # reset, as it should be
                    continue
        return True

    tracemalloc.start()
    try:
        assert await as_peer(claim, network.addresses()[0])
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert await answers(network)


@pytest.mark.parametrize("claimed", [0, MAX_MESSAGE + 2, 0xFFFFFFFF])
async def test_a_reply_of_an_impossible_size_is_the_peers_fault(network: Libp2pNetwork, claimed: int) -> None:
    seen, asked = Witness(network), threading.Event()

    async def serve(host: object) -> None:
        async def lie(stream: object) -> None:
            await stream.write(claimed.to_bytes(4, "big"))  # type: ignore[attr-defined]

        host.set_stream_handler(TProtocol("/weft/lie/1"), lie)  # type: ignore[attr-defined]
        await trio.to_thread.run_sync(asked.wait)

    serving = asyncio.create_task(as_peer(serve, network.addresses()[0]))
    liar = await seen.sees(Change.CONNECTED)
    try:
        with pytest.raises(PeerError):
            await network.request(liar, "/weft/lie/1", b"", deadline=SOON)
    finally:
        asked.set()
        await serving


async def test_garbage_on_any_protocol_does_not_stop_the_node(network: Libp2pNetwork) -> None:
    network.subscribe(TOPIC, lambda author, data: Verdict.ACCEPT, lambda author, data: asyncio.sleep(0))
    protocols = [MESHSUB, TProtocol(ECHO)]
    protocols += [
        TProtocol("/ipfs/ping/1.0.0"),
        TProtocol("/ipfs/id/push/1.0.0"),
        TProtocol("/ipfs/id/1.0.0"),
    ]

    async def spray(host: object) -> bool:
        (identity,) = host.get_network().connections  # type: ignore[attr-defined]
        for protocol in protocols:
            for garbage in (b"\xff" * 64, b"\x05hello", b"\x80" * 12, b"\x04\x0a\xff\xff\xff", b""):
                stream = await host.new_stream(identity, [protocol])  # type: ignore[attr-defined]
                await stream.write(garbage)
                await stream.reset()
        return True

    assert await as_peer(spray, network.addresses()[0])
    assert await answers(network)


async def test_a_peer_has_a_number_of_streams_at_once(network: Libp2pNetwork) -> None:
    async def pile_up(host: object) -> int:
        (identity,) = host.get_network().connections  # type: ignore[attr-defined]
        opened = 0
        for _ in range(STREAMS_PER_PEER + 10):
            try:
                with trio.fail_after(SOON):
                    await host.new_stream(identity, [MESHSUB])  # type: ignore[attr-defined]
                opened += 1
            except Exception:
                break
        return opened

    opened = await as_peer(pile_up, network.addresses()[0])
    assert isinstance(opened, int)
    assert 10 < opened <= STREAMS_PER_PEER
    assert await answers(network)


def gossip(keys: KeyPair, author: bytes, data: bytes, *, seqno: bytes = bytes(8)) -> bytes:
    """A pubsub frame with one message, signed with `keys` in the name of `author`."""
    message = rpc_pb2.Message(data=data, topicIDs=[TOPIC], from_id=author, seqno=seqno)
    message.signature = keys.private_key.sign(b"libp2p-pubsub:" + message.SerializeToString())
    message.key = keys.public_key.serialize()
    return encode_varint_prefixed(rpc_pb2.RPC(publish=[message]).SerializeToString())


async def test_only_what_its_author_signed_is_judged(network: Libp2pNetwork) -> None:
    judged: asyncio.Queue[tuple[PeerId, bytes]] = asyncio.Queue()

    def validate(author: PeerId, data: bytes) -> Verdict:
        judged.put_nowait((author, data))
        return Verdict.ACCEPT

    network.subscribe(TOPIC, validate, lambda author, data: asyncio.sleep(0))
    mallory, alice = create_new_key_pair(), HostKey.generate()
    alice_keys = create_new_key_pair(alice.private_bytes)
    alice_id, own_id = ID.from_base58(alice.peer_id).to_bytes(), ID.from_base58(network.peer_id).to_bytes()
    broken = bytearray(gossip(alice_keys, alice_id, b"altered", seqno=b"00000001"))
    broken[broken.index(b"altered")] ^= 1
    frames = [
        gossip(mallory, alice_id, b"in the name of alice", seqno=b"00000002"),
        gossip(mallory, own_id, b"in your own name", seqno=b"00000003"),
        bytes(broken),
        gossip(alice_keys, alice_id, b"too long", seqno=b"0" * 1000),
        gossip(alice_keys, alice_id, bytes(MAX_MESSAGE + 1), seqno=b"00000004"),
        gossip(alice_keys, b"nobody at all", b"odd author", seqno=b"00000005"),
        gossip(alice_keys, alice_id, b"honest", seqno=b"00000006"),
        gossip(alice_keys, alice_id, b"honest", seqno=b"00000006"),
    ]

    async def spread(host: object) -> None:
        (identity,) = host.get_network().connections  # type: ignore[attr-defined]
        stream = await host.new_stream(identity, [MESHSUB])  # type: ignore[attr-defined]
        for frame in frames:
            await stream.write(frame)
        await trio.sleep(0.5)  # as long as the frames need

    await as_peer(spread, network.addresses()[0])
    assert await asyncio.wait_for(judged.get(), SOON) == (alice.peer_id, b"honest")
    assert judged.empty()


async def test_an_inbound_slot_ends_with_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.network.libp2p.host.HANDSHAKES", 0)
    limits = Limits(connections=2)
    async with Libp2pNetwork(HostKey.generate().private_bytes, LOOPBACK, limits=limits) as network:
        network.handle(ECHO, echo)
        for _ in range(4):
            assert await answers(network)


# -- crashes, leaks, silence -----------------------------------------------------------------------------


async def test_a_crash_of_the_thread_is_survived_at_the_same_address(
    network: Libp2pNetwork, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses, seen = network.addresses(), Witness(network)
    network.subscribe(TOPIC, lambda author, data: Verdict.ACCEPT, lambda author, data: asyncio.sleep(0))
    async with Libp2pNetwork(HostKey.generate().private_bytes, LOOPBACK) as stranger:
        await stranger.connect(addresses[0])
        await seen.sees(Change.CONNECTED)

        def crash() -> None:
            raise RuntimeError("a bug in libp2p")

        failing = iter([OSError(24, "Too many open files"), RuntimeError("another bug"), None])
        launch = network._launch

        async def launch_at_last() -> None:
            error = next(failing)
            if error is not None:
                raise error
            await launch()

        monkeypatch.setattr(network, "_launch", launch_at_last)
        monkeypatch.setattr("node.network.libp2p.network.delay_after", lambda failures, jitter: 0.0)

        async def meanwhile() -> None:
            with pytest.raises(Unreachable):
                await network.connect(stranger.addresses()[0])
            assert await network.publish(TOPIC, b"to nobody") == 0

        def notice(event: PeerEvent) -> None:
            if event.change is Change.DISCONNECTED and not attempts:
                attempts.append(asyncio.create_task(meanwhile()))

        attempts: list[asyncio.Task[None]] = []
        network.on_peer(notice)
        assert network._core is not None
        network._core.bridge.post(crash)
        assert await seen.sees(Change.DISCONNECTED) == stranger.peer_id
        assert "ended unexpectedly" in caplog.text
        await attempts[0]
        assert await persistently(stranger, addresses[0]) == b"back"
        assert network.addresses() == addresses
        assert caplog.text.count("cannot start again") == 2


async def persistently(stranger: Libp2pNetwork, address: str) -> bytes:
    """Connect and ask until there is an answer."""
    async with asyncio.timeout(SOON):
        while True:
            try:
                return await stranger.request(await stranger.connect(address), ECHO, b"back", deadline=SOON)
            except Unreachable:
                await asyncio.sleep(0.05)


async def test_a_cancelled_request_closes_its_stream(network: Libp2pNetwork) -> None:
    begun = asyncio.Queue[None]()

    async def hang(peer: PeerId, payload: bytes) -> bytes:
        begun.put_nowait(None)
        await asyncio.Event().wait()
        return b""

    network.handle("/weft/hang/1", hang)
    async with Libp2pNetwork(HostKey.generate().private_bytes, LOOPBACK) as stranger:
        await stranger.connect(network.addresses()[0])
        await stranger.ping(network.peer_id)
        assert stranger._core is not None
        (connection,) = stranger._core._swarm.get_connections()
        before = len(connection.get_streams())
        asking = asyncio.create_task(stranger.request(network.peer_id, "/weft/hang/1", b"", deadline=60))
        await asyncio.wait_for(begun.get(), SOON)
        assert len(connection.get_streams()) == before + 1
        asking.cancel()
        async with asyncio.timeout(SOON):
            while len(connection.get_streams()) > before:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def open_sockets() -> int:
    descriptors = Path("/proc/self/fd")
    return sum("socket:" in str(link.readlink()) for link in descriptors.iterdir() if link.is_symlink())


async def test_nothing_is_left_open_after_a_stop() -> None:
    async def one_life() -> None:
        async with (
            Libp2pNetwork(HostKey.generate().private_bytes, LOOPBACK) as alice,
            Libp2pNetwork(HostKey.generate().private_bytes, LOOPBACK) as bob,
        ):
            bob.handle(ECHO, echo)
            for each in (alice, bob):
                each.subscribe(TOPIC, lambda a, d: Verdict.ACCEPT, lambda a, d: asyncio.sleep(0))
            await alice.connect(bob.addresses()[0])
            await alice.request(bob.peer_id, ECHO, b"x", deadline=SOON)
            with pytest.raises(PeerError):
                await alice.connect(
                    f"{parse_address(bob.addresses()[0]).transport}/p2p/{HostKey.generate().peer_id}"
                )

    await one_life()
    sockets, threads = open_sockets(), threading.active_count()
    for _ in range(3):
        await one_life()
    assert open_sockets() == sockets
    assert threading.active_count() <= threads


async def test_a_start_that_is_cancelled_leaves_nothing_behind() -> None:
    network = Libp2pNetwork(HostKey.generate().private_bytes, LOOPBACK)
    sockets, threads = open_sockets(), threading.active_count()
    for checkpoints in range(4):
        starting = asyncio.create_task(network.start())
        for _ in range(checkpoints):
            await asyncio.sleep(0)
        starting.cancel()
        # On a busy machine the thread may have been quicker than the cancellation.
        await asyncio.gather(starting, return_exceptions=True)
        await network.stop()
    assert (open_sockets(), threading.active_count()) == (sockets, threads)
    async with network:
        assert network.addresses()


async def test_a_half_open_connection_takes_no_slot() -> None:
    limits = Limits(connections=2)
    async with Libp2pNetwork(HostKey.generate().private_bytes, LOOPBACK, limits=limits) as network:
        network.handle(ECHO, echo)
        port = int(parse_address(network.addresses()[0]).transport.rsplit("/", 1)[1])
        mute = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        try:
            assert await answers(network)
        finally:
            for each in mute:
                each.close()


SLEEPER = """
import asyncio, sys
from node.network.libp2p import Libp2pNetwork

async def main():
    async with Libp2pNetwork(bytes.fromhex(sys.argv[1]), ["/ip4/127.0.0.1/tcp/0"]) as network:
        print(network.addresses()[0], flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


async def test_a_process_that_was_stopped_is_noticed() -> None:
    limits = Limits(ping_interval=0.1, ping_deadline=0.3, ping_misses=2)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SLEEPER, HostKey.generate().private_bytes.hex()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin and process.stdout
    try:
        address = (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()
        async with Libp2pNetwork(HostKey.generate().private_bytes, LOOPBACK, limits=limits) as network:
            seen = Witness(network)
            sleeper = await network.connect(address)
            assert await network.ping(sleeper) < SOON
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(Unreachable):
                await network.ping(sleeper, deadline=0.3)
            assert await seen.sees(Change.DISCONNECTED) == sleeper
            process.send_signal(signal.SIGCONT)
            assert await network.connect(address) == sleeper
    finally:
        process.kill()
        await process.wait()


# -- addresses -------------------------------------------------------------------------------------------


async def test_a_wildcard_is_announced_as_concrete_addresses() -> None:
    async with (
        Libp2pNetwork(HostKey.generate().private_bytes, ["/ip4/0.0.0.0/tcp/0"]) as everywhere,
        Libp2pNetwork(HostKey.generate().private_bytes, LOOPBACK) as stranger,
    ):
        addresses = everywhere.addresses()
        assert addresses and not any("/0.0.0.0/" in address for address in addresses)
        for address in addresses:
            assert parse_address(address).peer == everywhere.peer_id
        seen = Witness(stranger)
        # The stranger sees a port that nobody listens on, until identify tells it where we do.
        await everywhere.connect(stranger.addresses()[0])
        await seen.sees(Change.CONNECTED)
        async with asyncio.timeout(SOON):  # identify tells them all
            while set(stranger.peers()[0].addresses) != set(addresses):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def test_wildcards_become_interfaces_and_the_rest_stays() -> None:
    def interfaces(version: int) -> list[str]:
        return ["127.0.0.1", "192.0.2.1", "169.254.7.7", "192.0.2.9"] if version == 4 else ["::1", "fe80::1"]

    given = ["/ip4/0.0.0.0/tcp/7", "/ip6/::/tcp/7", "/ip4/192.0.2.1/tcp/7", "/ip4/127.0.0.1/tcp/7"]
    assert concrete(given, interfaces) == [
        "/ip4/192.0.2.1/tcp/7",
        "/ip4/192.0.2.9/tcp/7",
        "/ip6/::1/tcp/7",
        "/ip4/127.0.0.1/tcp/7",
    ]


async def test_announced_addresses_replace_the_others() -> None:
    announce = ["/dns4/node.example/tcp/443"]
    key = HostKey.generate()
    async with Libp2pNetwork(key.private_bytes, LOOPBACK, announce=announce) as network:
        assert network.addresses() == (f"/dns4/node.example/tcp/443/p2p/{key.peer_id}",)


@pytest.mark.parametrize("listen", ["", "127.0.0.1:9", "/ip4/127.0.0.1", "/ip4/127.0.0.1/tcp/70000"])
def test_a_malformed_listen_address_is_reported(listen: str) -> None:
    with pytest.raises(LocalError):
        Libp2pNetwork(HostKey.generate().private_bytes, [listen])


async def test_a_port_that_another_program_uses_is_reported() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        network = Libp2pNetwork(HostKey.generate().private_bytes, [f"/ip4/127.0.0.1/tcp/{port}"])
        with pytest.raises(LocalError) as caught:
            await network.start()
        assert str(port) in caught.value.why
        assert str(port) in caught.value.hint
    await network.start()
    await network.stop()


async def test_an_address_that_is_not_ours_is_reported() -> None:
    network = Libp2pNetwork(HostKey.generate().private_bytes, ["/ip4/192.0.2.1/tcp/0"])
    with pytest.raises(LocalError):
        await network.start()
    assert network.peers() == ()


def test_the_root_logger_stays_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger().warning("ours")
    assert "ours" in caplog.text


# -- another implementation ------------------------------------------------------------------------------

JS_VERSIONS = {
    "libp2p": "3.3.11",
    "@libp2p/tcp": "11.0.28",
    "@chainsafe/libp2p-noise": "17.0.0",
    "@chainsafe/libp2p-yamux": "8.0.1",
    "@libp2p/identify": "4.1.14",
    "@libp2p/ping": "3.1.13",
    "@libp2p/plaintext": "3.0.26",
    "@multiformats/multiaddr": "13.0.3",
}


@pytest.fixture(scope="module")
def js_folder() -> Path:
    """js-libp2p, installed once into a cache folder of its own."""
    if shutil.which("npm") is None:
        pytest.skip("needs node.js 20 and npm")
    folder = Path(__file__).parents[2] / ".cache" / "js-libp2p"
    wanted = json.dumps({"private": True, "type": "module", "dependencies": JS_VERSIONS})
    manifest = folder / "package.json"
    if not manifest.exists() or manifest.read_text() != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / "package.json.new"
        draft.write_text(wanted)
        shutil.copy(draft, manifest)
        status = os.system(
            f"cd '{folder}' && npm install --no-audit --no-fund --loglevel=error >npm.log 2>&1"
        )
        if status:
            manifest.unlink()
            pytest.fail((folder / "npm.log").read_text()[-2000:])
    shutil.copy(Path(__file__).with_name("js_peer.mjs"), folder)
    return folder


async def js_peer(folder: Path, address: str, security: str) -> tuple[asyncio.subprocess.Process, dict, str]:  # type: ignore[type-arg]
    """Start a JavaScript peer; return its process, what it says of the dial, and its own address."""
    process = await asyncio.create_subprocess_exec(
        *("node", "js_peer.mjs", address, security),
        cwd=folder,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout
    async with asyncio.timeout(30):
        dialled = json.loads(await process.stdout.readline())
        (own,) = json.loads(await process.stdout.readline())["self"]
    return process, dialled, own


@pytest.mark.foreign
async def test_js_libp2p_connects_identifies_and_pings_both_ways(
    network: Libp2pNetwork, js_folder: Path
) -> None:
    seen = Witness(network)
    process, dialled, own = await js_peer(js_folder, network.addresses()[0], "noise")
    try:
        assert dialled["peer"] == network.peer_id
        assert dialled["encryption"] == "/noise"
        assert {ECHO, "/ipfs/ping/1.0.0", "/ipfs/id/1.0.0"} <= set(dialled["protocols"])
        assert [f"{address}/p2p/{network.peer_id}" for address in dialled["listens"]] == list(
            network.addresses()
        )
        assert dialled["milliseconds"] >= 0

        foreign = await seen.sees(Change.CONNECTED)
        assert parse_address(own).peer == foreign
        assert await network.ping(foreign) < SOON
        (info,) = network.peers()
        assert (info.direction, info.addresses) == (Direction.INBOUND, (own,))
        await network.disconnect(foreign)
        assert await network.connect(own) == foreign
        assert await network.ping(foreign) < SOON
        with pytest.raises(PeerError):
            await network.request(foreign, ECHO, b"", deadline=SOON)
    finally:
        process.kill()
        await process.wait()
    assert await seen.sees(Change.DISCONNECTED) == foreign


@pytest.mark.foreign
async def test_js_libp2p_in_plaintext_is_refused_either_way(network: Libp2pNetwork, js_folder: Path) -> None:
    process, dialled, own = await js_peer(js_folder, network.addresses()[0], "plaintext")
    try:
        assert set(dialled) == {"error", "text"}
        assert network.peers() == ()
        with pytest.raises((Unreachable, PeerError)):
            await network.connect(own)
    finally:
        process.kill()
        await process.wait()
