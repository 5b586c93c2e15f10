"""Fetching from real peer ports: byte for byte, from whoever is honest, and nothing twice."""

import asyncio
import hashlib
import itertools
import os
import shutil
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from merge_core.checkpoint import merkle
from merge_core.digest import Digest, ModelId
from merge_core.errors import CorruptCheckpoint
from node.domain.reasons import Reason
from node.errors import LimitReached, LocalError, NotEnoughPeers, PeerError, Refused
from node.exchange import lookup
from node.exchange.fetch import Fetched, fetch
from node.exchange.partial import folder_of
from node.exchange.schedule import Patience
from node.peer.server import PeerServer, Piece
from node.provenance import oms
from node.provenance.fingerprint import SignedFingerprint

pytestmark = pytest.mark.anyio
BRISK = Patience(floor=0.3, initial=0.5, ceiling=1.0, rest=0.05)
MIB = 1 << 20


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def lying(published: Any, folder: Path, change: Callable[[Path], None], **claims: Any) -> Any:
    """A shelf that serves a tampered copy as if it were the expert."""
    held = published.shelf.open(published.expert.model_id)
    copy = Path(shutil.copytree(held.directory, folder))
    change(copy)
    told = {name: getattr(held, name) for name in ("publisher", "manifest", "leaf_table")}
    told |= {"directory": copy, "files": held.files, "tensors": held.tensors, **claims}
    return SimpleNamespace(open=lambda *_: SimpleNamespace(**told))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


class Stalling(PeerServer):
    """Sends two pieces of every answer that has more, and then nothing, forever."""

    async def _read(self, pieces: Sequence[Piece]) -> AsyncGenerator[bytes, None]:
        few = pieces[:2]
        async for data in super()._read(few):
            yield data
        if len(pieces) > len(few):
            await asyncio.Event().wait()


class Counting(PeerServer):
    """Knows how many bytes of leaves it has sent."""

    sent = 0

    async def _read(self, pieces: Sequence[Piece]) -> AsyncGenerator[bytes, None]:
        async for data in super()._read(pieces):
            self.sent += len(data)
            yield data


async def start(world: Any, published: Any, *shelves: Any, server: Any = PeerServer) -> list[Any]:
    """Start an asker, which serves nothing of use, and a holder for each shelf."""
    model = published.expert.model_id
    asker = await world.node(published.shelf)
    return [world.client(asker, await world.node(shelf, server), grant=model) for shelf in shelves]


async def get(published: Any, holders: Sequence[Any], destination: Path, **options: Any) -> Fetched:
    options = {"clock": time.monotonic, **options}
    return await fetch(published.expert.model_id, holders, destination, **options)


async def test_an_expert_arrives_as_its_publisher_signed_it(
    world: Any, published: Any, tmp_path: Path
) -> None:
    holders = await start(world, published, published.shelf, published.shelf)
    seen: list[Any] = []
    fetched = await get(published, holders, tmp_path / "got", on_progress=seen.append)
    assert files_of(fetched.directory) == files_of(published.expert.directory)
    assert fetched.manifest.model_id == published.expert.model_id
    assert fetched.publisher == published.expert.publisher
    assert names_in(tmp_path) == ["got"], "no trace of the construction"
    assert set(fetched.received) == {holder.peer for holder in holders}, "both took part"
    assert seen[-1].done == seen[-1].total == fetched.manifest.size
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert not fetched.dropped and not fetched.copied


async def test_a_flipped_byte_is_caught_within_its_leaf_and_never_stored(
    world: Any, published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = published.shelf.open(published.expert.model_id)
    file, span = min(held.tensors.values(), key=lambda place: (place[1].begin, -place[1].end))
    liar_shelf = lying(published, tmp_path / "lie", lambda copy: flip(copy / file, span.begin + 17))
    liar, honest = await start(world, published, liar_shelf, published.shelf)
    written: list[bytes] = []
    pwrite = os.pwrite

    def spy(fd: int, data: bytes, offset: int) -> int:
        written.append(bytes(data))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", spy)
    fetched = await get(published, [liar, honest], tmp_path / "got")
    assert files_of(fetched.directory) == files_of(published.expert.directory)
    bad = (tmp_path / "lie" / file).read_bytes()[span.begin : span.begin + MIB]
    assert merkle.leaf_digest(bad) not in {merkle.leaf_digest(data) for data in written}
    assert isinstance(fetched.dropped[liar.peer], PeerError)
    assert "HASH_MISMATCH" in fetched.dropped[liar.peer].why


async def test_a_liar_alone_gives_nothing_but_an_error(world: Any, published: Any, tmp_path: Path) -> None:
    held = published.shelf.open(published.expert.model_id)
    file, span = held.tensors["model.layers.0.weight"]
    (liar,) = await start(
        world, published, lying(published, tmp_path / "lie", lambda copy: flip(copy / file, span.begin))
    )
    with pytest.raises(NotEnoughPeers, match="HASH_MISMATCH"):
        await get(published, [liar], tmp_path / "got")
    assert not (tmp_path / "got").exists()
    stored = (folder_of(tmp_path / "got") / "files" / file).read_bytes()
    assert stored[span.begin : span.begin + MIB] == bytes(MIB), "the leaf's place is still empty"


async def test_the_honest_holder_is_found_after_each_kind_of_lie(
    world: Any, published: Any, tmp_path: Path
) -> None:
    held = published.shelf.open(published.expert.model_id)
    weights = held.directory / "model.safetensors"
    header = weights.read_bytes()[: min(s.begin for _, s in held.tensors.values())]
    table = bytearray(held.leaf_table)
    table[40] ^= 1

    def grow(copy: Path) -> None:
        (copy / "model.safetensors").write_bytes(weights.read_bytes() + b"more")

    lies: dict[str, Any] = {
        "config": (lambda copy: flip(copy / "config.json", 3), {}),
        "signature": (lambda copy: flip(copy / "model.sig", 300), {}),
        "publisher": (lambda copy: flip(copy / "weft.publisher.json", 60), {}),
        "header": (lambda copy: flip(copy / "model.safetensors", header.index(b'"pt"') + 1), {}),
        "shape": (lambda copy: flip(copy / "model.safetensors", header.index(b"1310720")), {}),
        "size": (grow, {"files": {**held.files, "model.safetensors": weights.stat().st_size + 4}}),
        "missing": (lambda copy: None, {"files": {n: s for n, s in held.files.items() if n != "README.md"}}),
        "manifest": (lambda copy: None, {"manifest": held.manifest.replace(b"Llama", b"Lambda")}),
        "leaves": (lambda copy: None, {"leaf_table": bytes(table)}),
        "endless": (lambda copy: None, {"leaf_table": held.leaf_table * 1000}),
        "nobody": (lambda copy: None, {"publisher": "sha256:" + "0" * 64}),
    }
    for name, (change, claims) in lies.items():
        liar, honest = await start(
            world, published, lying(published, tmp_path / f"lie-{name}", change, **claims), published.shelf
        )
        fetched = await get(published, [liar, honest], tmp_path / name)
        assert files_of(fetched.directory) == files_of(published.expert.directory), name
        assert fetched.publisher == published.expert.publisher, name
        assert not [path for path in names_in(tmp_path) if path.startswith(".")], name


async def test_after_a_lie_in_a_header_no_leaf_is_fetched_again(
    world: Any, published: Any, tmp_path: Path
) -> None:
    held = published.shelf.open(published.expert.model_id)
    at = (held.directory / "model.safetensors").read_bytes().index(b'"pt"') + 1
    liar_shelf = lying(published, tmp_path / "lie", lambda copy: flip(copy / "model.safetensors", at))
    liar, honest = await start(world, published, liar_shelf, published.shelf)
    fetched = await get(published, [liar, honest], tmp_path / "got")
    assert files_of(fetched.directory) == files_of(published.expert.directory)
    assert "header" in fetched.dropped[liar.peer].why
    assert fetched.copied == fetched.manifest.size


async def test_a_stalling_holder_is_overtaken(world: Any, published: Any, tmp_path: Path) -> None:
    asker = await world.node(published.shelf)
    model = published.expert.model_id
    slow, fast = [
        world.client(asker, await world.node(published.shelf, kind), grant=model)
        for kind in (Stalling, PeerServer)
    ]
    fetched = await get(published, [slow, fast], tmp_path / "got", patience=BRISK)
    assert files_of(fetched.directory) == files_of(published.expert.directory)
    assert fetched.received[fast.peer] > 10 * MIB


async def test_a_holder_that_only_stalls_is_given_up(world: Any, published: Any, tmp_path: Path) -> None:
    class Mute(PeerServer):
        async def _read(self, pieces: Sequence[Piece]) -> AsyncGenerator[bytes, None]:
            if len(pieces) > 1:
                await asyncio.Event().wait()
            async for data in super()._read(pieces):
                yield data

    (mute,) = await start(world, published, published.shelf, server=Mute)
    with pytest.raises(NotEnoughPeers, match="sent nothing for too long"):
        await get(published, [mute], tmp_path / "got", patience=BRISK)
    assert not (tmp_path / "got").exists()


async def test_a_dying_holder_is_replaced(world: Any, published: Any, tmp_path: Path) -> None:
    asker = await world.node(published.shelf)
    model = published.expert.model_id
    nodes = [await world.node(published.shelf) for _ in range(2)]
    clients = [world.client(asker, node, grant=model) for node in nodes]
    dying: list[asyncio.Task[None]] = []

    def kill(progress: Any) -> None:
        if progress.received.get(nodes[0].peer, 0) > MIB and not dying:
            dying.append(asyncio.create_task(nodes[0].server.stop(0)))

    fetched = await get(published, clients, tmp_path / "got", on_progress=kill)
    assert dying and files_of(fetched.directory) == files_of(published.expert.directory)


async def test_an_interrupted_fetch_goes_on_with_the_missing_leaves_only(
    world: Any, published: Any, tmp_path: Path
) -> None:
    asker = await world.node(published.shelf)
    model = published.expert.model_id
    first, second = [await world.node(published.shelf, Counting) for _ in range(2)]
    enough = asyncio.Event()
    kept = 0

    def watch(progress: Any) -> None:
        nonlocal kept
        kept = progress.done
        if progress.done > 8 * MIB:
            enough.set()

    running = asyncio.create_task(
        get(published, [world.client(asker, first, grant=model)], tmp_path / "got", on_progress=watch)
    )
    await enough.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not (tmp_path / "got").exists()

    held = published.shelf.open(model)
    seen: list[Any] = []
    fetched = await get(
        published,
        [world.client(asker, second, grant=model)],
        tmp_path / "got",
        on_progress=seen.append,
    )
    assert files_of(fetched.directory) == files_of(published.expert.directory)
    assert seen[0].done >= kept > 8 * MIB
    small = sum(size for name, size in held.files.items() if name != "model.safetensors") + 8192
    assert second.server.sent <= fetched.manifest.size - seen[0].done + small
    assert names_in(tmp_path) == ["got"]


async def test_what_the_disk_lost_after_it_was_journalled_is_fetched_again(
    world: Any, published: Any, tmp_path: Path
) -> None:
    (holder,) = await start(world, published, published.shelf)
    done: list[Any] = []

    def stop(progress: Any) -> None:
        done.append(progress)
        if len(done) == 6:
            running.cancel()

    running = asyncio.create_task(get(published, [holder], tmp_path / "got", on_progress=stop))
    with pytest.raises(asyncio.CancelledError):
        await running
    weights = folder_of(tmp_path / "got") / "files" / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    fetched = await get(published, [holder], tmp_path / "got")
    assert files_of(fetched.directory) == files_of(published.expert.directory)


async def test_another_layout_under_construction_is_not_gone_on_with(
    world: Any, published: Any, tmp_path: Path
) -> None:
    (holder,) = await start(world, published, published.shelf)
    folder = folder_of(tmp_path / "got")
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "stray.json").write_text("{}")
    (folder / "journal").write_bytes(b"0" * 64 + b"\n" + bytes(8))
    fetched = await get(published, [holder], tmp_path / "got")
    assert files_of(fetched.directory) == files_of(published.expert.directory)


async def test_a_tensor_that_is_here_already_is_copied_and_not_fetched(
    world: Any, published: Any, tmp_path: Path
) -> None:
    asker = await world.node(published.shelf)
    model = published.expert.model_id
    node = await world.node(published.shelf, Counting)
    client = world.client(asker, node, grant=model)
    held = published.shelf.open(model)
    right, wrong = (merkle.content_root(held.leaves[f"model.layers.{i}.weight"]).hex() for i in (1, 3))

    class Some:
        """A shelf that knows two of the tensors, one of them wrongly."""

        def locate(self, root: str, length: int) -> Any:
            place = published.shelf.locate(root, length)
            if root == wrong:
                return SimpleNamespace(path=place.path, offset=place.offset + 4)
            return place if root == right else None

    fetched = await get(published, [client], tmp_path / "got", have=Some())
    assert files_of(fetched.directory) == files_of(published.expert.directory)
    assert fetched.copied == 5 * MIB, "the one whose bytes verified"
    small = sum(size for name, size in held.files.items() if name != "model.safetensors")
    assert node.server.sent <= fetched.manifest.size - 5 * MIB + small + 8192

    again = await get(published, [client], tmp_path / "again", have=published.shelf)
    assert again.copied == again.manifest.size


async def test_a_local_model_that_cannot_be_read_costs_a_fetch_and_no_pause_of_the_loop(
    world: Any, published: Any, tmp_path: Path
) -> None:
    (holder,) = await start(world, published, published.shelf)
    troubles = itertools.cycle([OSError("gone"), CorruptCheckpoint("damaged")])
    threads: set[int] = set()

    class Broken:
        def locate(self, root: str, length: int) -> Any:
            threads.add(threading.get_ident())
            raise next(troubles)

    fetched = await get(published, [holder], tmp_path / "got", have=Broken())
    assert files_of(fetched.directory) == files_of(published.expert.directory)
    assert not fetched.copied and threads and threading.get_ident() not in threads


async def test_a_refusal_travels_to_whoever_asked(world: Any, published: Any, tmp_path: Path) -> None:
    asker, holder = await world.node(published.shelf), await world.node(published.shelf)
    client = world.client(asker, holder)
    with pytest.raises(Refused) as caught:
        await get(published, [client], tmp_path / "got")
    assert caught.value.reason is Reason.NOT_ENTITLED
    assert names_in(tmp_path) == []


async def test_a_model_nobody_has_and_nobody_at_all(world: Any, published: Any, tmp_path: Path) -> None:
    (holder,) = await start(world, published, published.shelf)
    unknown = SimpleNamespace(expert=SimpleNamespace(model_id=ModelId("sha256:" + "9" * 64)))
    with pytest.raises(Refused) as caught:
        await get(unknown, [holder], tmp_path / "got")
    assert caught.value.reason is Reason.UNKNOWN_MODEL
    with pytest.raises(NotEnoughPeers):
        await get(published, [], tmp_path / "got")
    assert names_in(tmp_path) == []


async def test_a_destination_in_use_is_left_alone(world: Any, published: Any, tmp_path: Path) -> None:
    (holder,) = await start(world, published, published.shelf)
    (tmp_path / "got").mkdir()
    (tmp_path / "got" / "mine.txt").write_text("mine")
    with pytest.raises(LocalError, match="exists already"):
        await get(published, [holder], tmp_path / "got")
    assert names_in(tmp_path / "got") == ["mine.txt"] and names_in(tmp_path) == ["got"]


async def test_a_full_disk_leaves_nothing(
    world: Any, published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (holder,) = await start(world, published, published.shelf)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(LimitReached, match="No space left"):
        await get(published, [holder], tmp_path / "got")
    assert names_in(tmp_path) == []
    monkeypatch.undo()

    calls = itertools.count()
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *a: full() if next(calls) == 5 else pwrite(*a))
    with pytest.raises(LimitReached, match="No space left"):
        await get(published, [holder], tmp_path / "got")
    assert not (tmp_path / "got").exists()
    assert names_in(tmp_path) == [".got.partial"], "what a resume needs, and nothing beside it"


async def test_two_fetches_do_not_write_one_directory(world: Any, published: Any, tmp_path: Path) -> None:
    (holder,) = await start(world, published, published.shelf)
    second: list[asyncio.Task[Any]] = []

    def also(progress: Any) -> None:
        if progress.done > MIB and not second:
            second.append(asyncio.create_task(get(published, [holder], tmp_path / "got")))

    fetched = await get(published, [holder], tmp_path / "got", on_progress=also)
    (outcome,) = await asyncio.gather(second[0], return_exceptions=True)
    # Whichever it met: the first at work, or its result, which it then verified.
    assert (isinstance(outcome, LocalError) and "another fetch" in outcome.why) or (
        isinstance(outcome, Fetched) and not outcome.copied
    )
    assert files_of(fetched.directory) == files_of(published.expert.directory)
    assert names_in(tmp_path) == ["got"]


async def test_manifest_config_and_fingerprint_can_be_had_without_an_agreement(
    world: Any, published: Any
) -> None:
    asker, holder = await world.node(published.shelf), await world.node(published.shelf)
    client = world.client(asker, holder)
    expert = published.expert
    manifest = await lookup.read_manifest([client], expert.model_id)
    assert manifest.model_id == expert.model_id
    assert await lookup.read_leaf_table([client], manifest) == published.shelf.open(expert.model_id).leaves
    assert (await lookup.read_config([client], manifest))["architectures"] == ["LlamaForCausalLM"]
    tokenizer = await lookup.read_tokenizer([client], manifest)
    assert (
        sorted(tokenizer) == ["config.json", "tokenizer.json"]
        and tokenizer["tokenizer.json"] == b'{"model":{}}'
    )
    sketch = await lookup.read_fingerprint([client], expert.model_id, expert.fingerprint)
    assert SignedFingerprint.parse(sketch).fingerprint.model_id == expert.model_id
    with pytest.raises(NotEnoughPeers, match="is not a merge"):
        await lookup.read_plan([client], expert.model_id)
    with pytest.raises(Refused) as refused:
        await lookup.read_fingerprint([client], expert.model_id, Digest("sha256:" + "1" * 64))
    assert refused.value.reason is Reason.UNKNOWN_MODEL
    with pytest.raises(NotEnoughPeers, match="another model's fingerprint"):
        await lookup.read_fingerprint([client], ModelId("sha256:" + "1" * 64), expert.fingerprint)
    liar = await world.node(published.shelf, similarity=SimpleNamespace(fingerprint=lambda digest: sketch))
    with pytest.raises(NotEnoughPeers, match="another fingerprint"):
        await lookup.read_fingerprint(
            [world.client(asker, liar)], expert.model_id, Digest("sha256:" + "1" * 64)
        )


def test_what_was_fetched_passes_the_signature_check(published: Any) -> None:
    """The oracle of the other tests: equal bytes are bytes that the publisher's signature covers."""
    from node.identity.binding import Binding

    directory = published.expert.directory
    binding = Binding.parse((directory / "weft.publisher.json").read_bytes())
    assert len(oms.verify_directory(directory, binding.publisher).files) == len(files_of(directory)) - 1
    assert hashlib.sha256((directory / "weft.manifest.json").read_bytes()).hexdigest() == (
        published.expert.model_id.hex
    )
