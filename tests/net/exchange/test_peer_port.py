"""The peer port: who may call, what they may have, and how a no travels. Real servers on loopback."""

import asyncio
import hashlib
import platform
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from merge_core.digest import Digest, ModelId, sha256
from merge_core.errors import CorruptCheckpoint
from node.domain import sketches
from node.domain.holding import ByteRange, ModelRef
from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import LocalError, PeerError, Refused, Unreachable
from node.identity.certificates import TARGET_NAME, make_certificate
from node.identity.keys import HostKey
from node.network.base import PeerInfo
from node.peer import credentials
from node.peer.admitted import Admitted
from node.peer.calls import OF_ONE_PEER, Calls
from node.peer.client import Endpoint, PeerClient, target
from node.peer.credentials import CredentialExchange
from node.peer.memory import keep_freed_pieces
from node.peer.transport import SERVICE
from node.wire import peer as wire
from node.wire.v1 import peer_pb2 as pb

pytestmark = pytest.mark.anyio
UNKNOWN = ModelRef(model_id=ModelId("sha256:" + "9" * 64), publisher=None)


def ref(published: Any) -> ModelRef:
    return ModelRef(model_id=published.expert.model_id, publisher=Digest(published.expert.publisher))


async def read(stream: Any) -> bytes:
    return b"".join([piece async for piece in stream])


async def test_an_admitted_peer_reads_what_was_agreed(world: Any, published: Any) -> None:
    holder, asker = await world.node(published.shelf), await world.node(published.shelf)
    model = published.expert.model_id
    client = world.client(asker, holder, grant=model)
    held = published.shelf.open(model)

    holding = await client.describe(ref(published))
    assert {f.path: f.size for f in holding.files} == dict(held.files)
    assert holding.publisher == published.expert.publisher
    manifest = await read(client.manifest(ref(published)))
    assert "sha256:" + hashlib.sha256(manifest).hexdigest() == model
    assert await read(client.leaf_table(ref(published))) == held.leaf_table
    whole = (published.expert.folder / "fingerprint.bin").read_bytes()
    digest, sketch = published.expert.fingerprint, published.expert.sketch
    assert await read(client.fingerprint(digest)) == whole
    assert await read(client.fingerprint(digest, 100)) == whole[100:]
    unknown = sha256(b"unknown")
    answer = sketches.unpack(await read(client.sketches([unknown, sketch])), [unknown, sketch])
    assert [sha256(mini) for mini in answer.values()] == [sketch]

    weights = (held.directory / "model.safetensors").read_bytes()
    assert await read(client.file(ref(published), "model.safetensors", 5, 3_000_000)) == weights[5:3_000_005]
    _, span = held.tensors["c.odd"]
    odd = weights[span.begin : span.end]
    pieces = [
        p
        async for p in client.leaves(
            ref(published),
            [
                ByteRange(tensor="c.odd", offset=1_000_000, length=500_001),
                ByteRange(tensor="b.empty", offset=0, length=0),
                ByteRange(tensor="a.bias", offset=0, length=28),
            ],
        )
    ]
    assert [len(p) for p in pieces] == [48_576, 451_425, 28], "cut at the leaves of each tensor"
    assert b"".join(pieces[:2]) == odd[1_000_000:]


async def test_without_an_agreement_only_what_planning_needs_is_served(world: Any, published: Any) -> None:
    holder, asker = await world.node(published.shelf), await world.node(published.shelf)
    client = world.client(asker, holder)
    assert await read(client.manifest(ref(published)))
    for path in ("config.json", "tokenizer.json"):
        assert await read(client.file(ref(published), path, 0, 10))
    for stream in (
        client.file(ref(published), "README.md", 0, 1),
        client.file(ref(published), "model.safetensors", 0, 8),
        client.leaves(ref(published), [ByteRange(tensor="a.bias", offset=0, length=28)]),
    ):
        with pytest.raises(Refused) as caught:
            await read(stream)
        assert caught.value.reason is Reason.NOT_ENTITLED
    assert holder.ledger.counted == 0


async def test_a_stranger_does_not_get_through_the_handshake(world: Any, published: Any) -> None:
    holder, friend, stranger = [await world.node(published.shelf) for _ in range(3)]
    world.client(friend, holder)
    endpoint = Endpoint(
        peer=holder.peer, hosts=("127.0.0.1",), port=holder.port, certificate=holder.certificate.pem
    )
    client = PeerClient(endpoint, stranger.certificate)
    world.clients.append(client)
    with pytest.raises(Unreachable):
        await client.describe(ref(published))


async def test_somebody_elses_server_is_not_taken_for_the_peer(world: Any, published: Any) -> None:
    holder, imposter, asker = [await world.node(published.shelf) for _ in range(3)]
    imposter.admitted.admit(asker.peer, asker.certificate.pem)
    endpoint = Endpoint(
        peer=holder.peer, hosts=("127.0.0.1",), port=imposter.port, certificate=holder.certificate.pem
    )
    client = PeerClient(endpoint, asker.certificate)
    world.clients.append(client)
    with pytest.raises(Unreachable):
        await client.describe(ref(published))


async def test_a_banned_peer_is_refused_on_the_connection_it_has(world: Any, published: Any) -> None:
    holder, asker = await world.node(published.shelf), await world.node(published.shelf)
    client = world.client(asker, holder, lanes=1)
    await client.describe(ref(published))
    holder.banned.add(asker.peer)
    with pytest.raises(Refused) as caught:
        await client.describe(ref(published))
    assert caught.value.reason is Reason.PEER_NOT_ALLOWED
    with pytest.raises(Refused) as caught:
        await answering(holder).answer(asker.peer, credentials.encode(asker.certificate.pem, asker.port))
    assert caught.value.reason is Reason.PEER_NOT_ALLOWED


async def test_admission_ends_by_itself(world: Any, published: Any) -> None:
    holder, asker = await world.node(published.shelf), await world.node(published.shelf)
    client = world.client(asker, holder, lanes=1)
    await client.describe(ref(published))
    holder.now += 3601
    with pytest.raises(Refused) as caught:
        await client.describe(ref(published))
    assert caught.value.reason is Reason.PEER_NOT_ALLOWED


async def test_what_is_not_there_or_not_well_asked_is_refused_with_its_reason(
    world: Any, published: Any
) -> None:
    holder, asker = await world.node(published.shelf), await world.node(published.shelf)
    client = world.client(asker, holder, grant=published.expert.model_id)
    cases = [
        (client.manifest(UNKNOWN), Reason.UNKNOWN_MODEL),
        (client.file(ref(published), "../identity/host.pem", 0, 1), Reason.MALFORMED),
        (client.file(ref(published), "record.json", 0, 1), Reason.MALFORMED),
        (client.file(ref(published), "config.json", 0, 1 << 20), Reason.MALFORMED),
        (client.file(ref(published), "config.json", -1, 1), Reason.MALFORMED),
        (client.leaves(ref(published), [ByteRange(tensor="zz", offset=0, length=1)]), Reason.MALFORMED),
        (client.leaves(ref(published), [ByteRange(tensor="a.bias", offset=8, length=21)]), Reason.MALFORMED),
        (
            client.leaves(ref(published), [ByteRange(tensor="a.bias", offset=0, length=28)] * 5000),
            Reason.MALFORMED,
        ),
        (client.fingerprint(sha256(b"unknown")), Reason.UNKNOWN_MODEL),
        (client.fingerprint(published.expert.fingerprint, 1 << 30), Reason.MALFORMED),
        (client.fingerprint(published.expert.fingerprint, -1), Reason.MALFORMED),
        (client.sketches([]), Reason.MALFORMED),
        (client.sketches([published.expert.sketch] * 1001), Reason.MALFORMED),
    ]
    for stream, reason in cases:
        with pytest.raises(Refused) as caught:
            await read(stream)
        assert caught.value.reason is reason
        assert caught.value.reason.sentence in caught.value.why


async def test_a_damaged_copy_is_reported_without_a_path(world: Any, published: Any, tmp_path: Path) -> None:
    held = published.shelf.open(published.expert.model_id)
    link = tmp_path / "model.safetensors"
    link.symlink_to(held.directory / "model.safetensors")
    (tmp_path / "config.json").write_bytes(b"{}")
    told = SimpleNamespace(
        publisher=held.publisher,
        directory=tmp_path,
        files={"config.json": 400, "model.safetensors": held.files["model.safetensors"]},
        tensors=held.tensors,
    )
    holder = await world.node(SimpleNamespace(open=lambda *_: told))
    asker = await world.node(published.shelf)
    client = world.client(asker, holder, grant=published.expert.model_id)
    short, symlink = client.file(UNKNOWN, "config.json", 0, 400), client.file(ref(published), link.name, 0, 8)
    for stream in (short, symlink):
        with pytest.raises(PeerError) as caught:
            await read(stream)
        assert str(tmp_path) not in caught.value.why


async def test_a_shelf_that_fails_is_described_without_a_path(world: Any, published: Any) -> None:
    asker = await world.node(published.shelf)
    for error in (OSError("/secret/model"), CorruptCheckpoint("/secret/model"), ValueError("/secret/model")):

        class Broken:
            publisher = published.expert.publisher

            @property
            def files(self, error: Exception = error) -> dict[str, int]:
                raise error

        def missing(*_: object, error: Exception = error) -> Any:
            raise error

        for shelf in (SimpleNamespace(open=lambda *_: Broken()), SimpleNamespace(open=missing)):
            client = world.client(asker, await world.node(shelf), lanes=1)
            with pytest.raises(PeerError) as caught:
                await client.describe(ref(published))
            assert caught.value.why == "the peer's own copy is damaged"


async def test_a_caller_that_stops_reading_is_cut_off(world: Any, published: Any) -> None:
    holder = await world.node(published.shelf, write_deadline=0.2)
    asker = await world.node(published.shelf)
    client = world.client(asker, holder, grant=published.expert.model_id, lanes=1)
    stream = client.leaves(
        ref(published),
        [ByteRange(tensor=f"model.layers.{i}.weight", offset=0, length=5 << 20) for i in range(4)] * 12,
    )
    assert await anext(stream)
    event = asyncio.Event()
    asyncio.get_running_loop().call_later(0.6, event.set)
    await event.wait()
    with pytest.raises(Refused) as caught:
        await read(stream)
    assert caught.value.reason is Reason.BUSY


def raw(world: Any, asker: Any, holder: Any) -> grpc.aio.Channel:
    """A connection of a peer that does not play by the rules: one that takes in next to nothing by itself."""
    holder.admitted.admit(asker.peer, asker.certificate.pem)
    own = asker.certificate
    secure = grpc.ssl_channel_credentials(holder.certificate.pem, own.key_pem, own.pem)
    options = (
        ("grpc.ssl_target_name_override", TARGET_NAME),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 1),
    )
    channel = grpc.aio.secure_channel(f"127.0.0.1:{holder.port}", secure, options=options)
    world.clients.append(channel)
    return channel


async def silence() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


@pytest.mark.parametrize("unread", [False, True])
async def test_one_peer_cannot_take_every_place(world: Any, published: Any, unread: bool) -> None:
    """A peer opens 224 calls: half-open ones, or such that it never reads."""
    holder = await world.node(published.shelf, request_deadline=60.0)
    greedy, honest = await world.node(published.shelf), await world.node(published.shelf)
    channels = [raw(world, greedy, holder) for _ in range(7)]
    request = pb.ReadManifestRequest(model=wire.model_ref(ref(published))).SerializeToString()
    calls = [
        channel.unary_stream(f"/{SERVICE}/ReadManifest")(request)
        if unread
        else channel.stream_unary(f"/{SERVICE}/Describe")(silence())
        for channel in channels
        for _ in range(32)
    ]
    held = {asyncio.create_task(call.code()) for call in calls}
    async with asyncio.timeout(30):
        while len(held) > OF_ONE_PEER:
            ended, held = await asyncio.wait(held, return_when=asyncio.FIRST_COMPLETED)
            assert {end.result() for end in ended} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert (await world.client(honest, holder, lanes=1).describe(ref(published))).files
    assert not any(end.done() for end in held)
    for call in calls:
        call.cancel()
    await asyncio.wait(held)


async def test_a_call_whose_request_does_not_come_or_is_none_is_ended(world: Any, published: Any) -> None:
    holder = await world.node(published.shelf, request_deadline=0.2, calls=Calls(of_one_peer=3))
    asker = await world.node(published.shelf)
    channel = raw(world, asker, holder)

    async def nothing() -> AsyncIterator[bytes]:
        return
        yield b""

    calls = [
        channel.stream_unary(f"/{SERVICE}/Describe")(silence()),
        channel.stream_unary(f"/{SERVICE}/Describe")(nothing()),
        channel.unary_unary(f"/{SERVICE}/Describe")(b"\xff"),
    ]
    client = world.client(asker, holder, lanes=1)
    async with asyncio.timeout(30):
        for call in calls:
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        while True:
            with suppress(Refused):  # its places are given back a moment after it was told
                assert (await client.describe(ref(published))).files
                break


async def test_a_caller_that_does_not_take_the_first_piece_is_told(world: Any, published: Any) -> None:
    holder = await world.node(published.shelf, write_deadline=0.0)
    channel = raw(world, await world.node(published.shelf), holder)
    request = pb.ReadManifestRequest(model=wire.model_ref(ref(published))).SerializeToString()
    call = channel.unary_stream(f"/{SERVICE}/ReadManifest")(request)
    async with asyncio.timeout(30):
        assert await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_places_are_counted_by_peer_and_given_back() -> None:
    calls = Calls(of_one_peer=2, of_all=3)
    alice, bob, carol = (peer for peer, _ in hosts(3))
    for peer in (alice, alice, bob):
        calls.begin(peer)
    for peer in (alice, carol):
        with pytest.raises(Refused) as caught:
            calls.begin(peer)
        assert caught.value.reason is Reason.BUSY
    calls.end(alice)
    calls.begin(carol)


async def test_a_port_in_use_names_the_way_out(world: Any, published: Any) -> None:
    holder = await world.node(published.shelf)
    with pytest.raises(LocalError, match="cannot listen") as caught:
        await (await world.node(published.shelf)).server.start(f"127.0.0.1:{holder.port}")
    assert "--peer-api" in caught.value.hint


async def test_the_cipher_is_aes_gcm_over_tls_1_3_and_nothing_else_gets_in(
    world: Any, published: Any
) -> None:
    holder = await world.node(published.shelf)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=holder.certificate.pem.decode())
    context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", holder.port, ssl=context, server_hostname="peer.weft.invalid"
    )
    assert writer.get_extra_info("cipher")[0] in {"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"}
    with pytest.raises((ssl.SSLError, ConnectionError)):
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
        if not await reader.read(1):
            raise ConnectionResetError
    writer.close()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{holder.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/weft.v1.Peer/Describe")(b"", timeout=5)


def hosts(count: int) -> list[tuple[PeerId, bytes]]:
    made = [HostKey.generate() for _ in range(count)]
    return [(host.peer_id, make_certificate(host, 0.0).pem) for host in made]


def test_the_admitted_set_has_one_certificate_for_each_peer() -> None:
    admitted = Admitted(clock=lambda: 0.0, limit=2)
    (alice, first), (_, second), (bob, third) = hosts(3)
    for peer, pem in ((alice, first), (bob, third), (alice, second)):
        admitted.admit(peer, pem)
    assert [admitted.peer_of(pem) for pem in (first, second, third)] == [None, alice, bob]
    assert len(admitted.certificates()) == 2


def test_a_crowd_of_identities_evicts_nobody_who_is_served() -> None:
    now, agreed = [0.0], set[PeerId]()
    admitted = Admitted(clock=lambda: now[0], engaged=lambda: agreed, limit=10)
    (partner, contract), (caller, used), *crowd = hosts(30)
    for peer, pem in ((partner, contract), (caller, used)):
        admitted.admit(peer, pem)
    agreed.add(partner)
    for peer, pem in crowd:
        now[0] += 10
        admitted.admit(peer, pem)
        assert admitted.peer_of(used) == caller, "it calls again and again"
    assert len(admitted.certificates()) == 10
    assert admitted.peer_of(contract) == partner
    kept = [pem for _, pem in crowd if pem in admitted.certificates()]
    assert kept == [pem for _, pem in [*crowd[:7], crowd[-1]]], "of the idle ones the newest go"


def test_a_full_set_is_busy_for_strangers_and_makes_room_for_a_partner() -> None:
    now, agreed = [0.0], set[PeerId]()
    admitted = Admitted(clock=lambda: now[0], engaged=lambda: agreed, limit=3)
    *callers, (stranger, unknown), (partner, contract) = hosts(5)
    for peer, pem in callers:
        admitted.admit(peer, pem)
        now[0] += 1
        assert admitted.peer_of(pem) == peer
    with pytest.raises(Refused) as caught:
        admitted.admit(stranger, unknown)
    assert caught.value.reason is Reason.BUSY
    agreed.add(partner)
    admitted.admit(partner, contract)
    assert [pem in admitted.certificates() for _, pem in callers] == [False, True, True]
    now[0] += 301
    admitted.admit(stranger, unknown)
    assert {contract, unknown} < set(admitted.certificates())
    agreed.update(peer for peer, _ in callers)
    agreed.add(stranger)
    now[0] += 301
    with pytest.raises(Refused):
        admitted.admit(*callers[0])


def test_admission_of_a_banned_peer_is_refused_and_ends_where_it_was_admitted() -> None:
    banned = set[PeerId]()
    admitted = Admitted(clock=lambda: 0.0, allowed=lambda peer: peer not in banned)
    ((mallory, pem),) = hosts(1)
    admitted.admit(mallory, pem)
    banned.add(mallory)
    assert admitted.peer_of(pem) is None and not admitted.certificates()
    with pytest.raises(Refused) as caught:
        admitted.admit(mallory, pem)
    assert caught.value.reason is Reason.PEER_NOT_ALLOWED


def test_the_allocator_can_be_told_to_keep_pieces() -> None:
    assert keep_freed_pieces() == (platform.libc_ver()[0] == "glibc")


class Line:
    """A network of two: requests go straight to the other side's handler."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.other: tuple[str, CredentialExchange] | None = None

    async def request(self, peer: str, protocol: str, payload: bytes, *, deadline: float) -> bytes:
        assert self.other and peer == self.other[0] and protocol == credentials.PROTOCOL
        return await self.other[1].answer(self.peer, payload)  # type: ignore[arg-type]

    def peers(self) -> tuple[PeerInfo, ...]:
        assert self.other
        return (
            PeerInfo(
                peer=self.other[0],  # type: ignore[arg-type]
                addresses=(f"/ip4/127.0.0.1/tcp/4001/p2p/{self.other[0]}", "/ip6/::1/tcp/4001"),
                direction=None,  # type: ignore[arg-type]
                latency=None,
            ),
        )


def answering(node: Any, line: Line | None = None) -> CredentialExchange:
    return CredentialExchange(
        network=line or Line(node.peer),  # type: ignore[arg-type]
        admitted=node.admitted,
        certificate=node.certificate,
        port=node.port,
        clock=time.time,
    )


async def test_certificates_are_exchanged_and_bound_to_the_stream(world: Any, published: Any) -> None:
    holder, asker = await world.node(published.shelf), await world.node(published.shelf)
    lines = [Line(asker.peer), Line(holder.peer)]
    ours, theirs = answering(asker, lines[0]), answering(holder, lines[1])
    lines[0].other, lines[1].other = (holder.peer, theirs), (asker.peer, ours)
    endpoint = await ours.ask(holder.peer)
    assert endpoint.hosts == ("127.0.0.1", "::1") and endpoint.port == holder.port
    assert target(endpoint) == f"ipv4:127.0.0.1:{holder.port}"
    client = PeerClient(endpoint, asker.certificate)
    world.clients.append(client)
    assert (await client.describe(ref(published))).files

    lines[0].peer = holder.peer  # the asker's certificate on somebody else's stream
    with pytest.raises(Refused) as caught:
        await ours.ask(holder.peer)
    assert caught.value.reason is Reason.MALFORMED


async def test_certificates_without_a_last_newline_lock_nobody_out(world: Any, published: Any) -> None:
    holder = await world.node(published.shelf)
    askers = [await world.node(published.shelf) for _ in range(5)]
    for i, asker in enumerate(askers):
        pem = asker.certificate.pem if i % 2 else asker.certificate.pem.strip()
        await answering(holder).answer(asker.peer, credentials.encode(pem, asker.port))
    for asker in askers:
        endpoint = Endpoint(
            peer=holder.peer, hosts=("127.0.0.1",), port=holder.port, certificate=holder.certificate.pem
        )
        client = PeerClient(endpoint, asker.certificate, lanes=1)
        world.clients.append(client)
        assert (await client.describe(ref(published))).files


async def test_whom_we_do_not_serve_may_serve_us(world: Any, published: Any) -> None:
    holder, asker = await world.node(published.shelf), await world.node(published.shelf)
    asker.banned.add(holder.peer)
    line = Line(asker.peer)
    line.other = (holder.peer, answering(holder))
    assert (await answering(asker, line).ask(holder.peer)).certificate == holder.certificate.pem
    assert not asker.admitted.certificates() and len(holder.admitted.certificates()) == 1


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"\xff",
        b'{"certificate":"x","port":70000,"version":1}',
        b'{"certificate":1,"port":1,"version":1}',
    ],
)
def test_malformed_credentials_are_a_peer_error(payload: bytes) -> None:
    with pytest.raises(PeerError):
        credentials.parse(payload)
