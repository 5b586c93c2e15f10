"""Records: whatever order they come in, and however often, two books end up with the same."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from merge_core.digest import canonical, sha256
from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import Refused
from node.identity.envelopes import Envelope, seal
from node.identity.keys import HostKey
from node.network.base import Verdict
from node.network.memory import Fabric, MemoryNetwork
from node.records.book import MAX_RECORD, Judgement, Kind, Outcome, RecordBook, leaving, read
from node.records.gossip import RecordGossip
from node.store import Store

NOW = 1_760_000_000.0
KEYS = [HostKey.from_private_bytes(bytes([seed]) * 32) for seed in range(1, 8)]
ME = HostKey.from_private_bytes(bytes([99]) * 32).peer_id


def number(body: Any) -> int:
    if type(body) is not int:
        raise ValueError("not a number")
    return body


KIND = Kind(name="numbers", read=number, of_one=3, of_all=8)


def book(folder: Path, kind: Kind[int] = KIND, *, network: str = "test") -> RecordBook[int]:
    return RecordBook(Store(folder / "node.db"), kind, network=network, me=ME)


def said(key: HostKey, value: Any, *, at: float = NOW, network: str = "test", kind: str = "numbers") -> bytes:
    """One record as its author signs it."""
    payload = canonical(
        {"version": 1, "network": network, "author": key.peer_id, "at": int(at), "body": value}
    )
    return seal(f"application/vnd.weft.record.{kind}+json", payload, key).to_bytes()


def test_a_record_counts_once_and_under_its_authors_signature_alone(tmp_path: Path) -> None:
    held = book(tmp_path)
    good = said(KEYS[0], 1)
    assert held.admit(good, NOW) is Outcome.NEW and held.admit(good, NOW) is Outcome.KNOWN
    envelope = Envelope.parse(good)
    stolen = Envelope(
        payload_type=envelope.payload_type,
        payload=envelope.payload,
        signatures=dict(Envelope.parse(said(KEYS[1], 1)).signatures),
    )
    wrong = {
        stolen.to_bytes(): Outcome.MALFORMED,
        said(KEYS[1], "text"): Outcome.MALFORMED,
        said(KEYS[1], 1, kind="others"): Outcome.MALFORMED,
        said(KEYS[1], 1, network="elsewhere"): Outcome.WRONG_NETWORK,
        said(KEYS[1], 1, at=NOW + 3600): Outcome.FUTURE,
        b"{}": Outcome.MALFORMED,
        b" " * (MAX_RECORD + 1): Outcome.MALFORMED,
    }
    assert {data: held.admit(data, NOW) for data in wrong} == wrong
    assert [(record.author, record.value) for record in held.records()] == [(KEYS[0].peer_id, 1)]


def test_what_is_kept_depends_on_what_came_and_not_on_the_order(tmp_path: Path) -> None:
    draw = random.Random(7)
    told = [said(key, n, at=NOW - n // 3) for i, key in enumerate(KEYS) for n in range(2 + 2 * i)]
    kept = set()
    for turn in range(12):
        order = told + draw.sample(told, 10)
        draw.shuffle(order)
        held = book(tmp_path / str(turn))
        for data in order:
            held.admit(data, NOW)
        kept.add(held.envelopes())
    assert len(kept) == 1
    (envelopes,) = kept
    authors = [read(KIND, data)[1].author for _, data in envelopes]
    assert len(envelopes) == KIND.of_all and len(set(authors)) == len(KEYS)


def test_the_oldest_of_whoever_has_most_leave_first() -> None:
    loud, quiet = KEYS[0].peer_id, KEYS[1].peer_id
    of: dict[PeerId, list[Any]] = {
        loud: [(-n, sha256(bytes([n]))) for n in (9, 8, 7, 6)],
        quiet: [(-1, sha256(b"q"))],
    }
    assert leaving(of, of_one=3, of_all=2, spared=ME) == tuple(sha256(bytes([n])) for n in (6, 7, 8))
    assert leaving(of, of_one=9, of_all=9, spared=ME) == ()
    assert leaving(of, of_one=3, of_all=1, spared=quiet) == tuple(sha256(bytes([n])) for n in (6, 7, 8))


def test_however_many_names_speak_a_node_keeps_what_it_found_itself(tmp_path: Path) -> None:
    held = RecordBook(Store(tmp_path / "node.db"), KIND, network="test", me=KEYS[0].peer_id)
    held.say(42, KEYS[0], NOW)
    strangers = [HostKey.from_private_bytes(bytes([seed, 7]) * 16) for seed in range(1, 60)]
    for key in strangers:
        held.admit(said(key, 0, at=NOW + 60), NOW)
    kept = held.records()
    assert len(kept) == KIND.of_all + 1
    assert [record.value for record in kept if record.author == KEYS[0].peer_id] == [42]


def test_a_book_is_after_a_restart_what_it_was(tmp_path: Path) -> None:
    held = book(tmp_path)
    for key in KEYS[:3]:
        held.admit(said(key, 5), NOW)
    first, second, _ = held.records()
    held.judge(first.digest, Judgement.REFUTED)
    held.judge(second.digest, Judgement.HOLDS)
    again = book(tmp_path)
    assert again.records() == held.records()
    assert again.judged() == {first.digest: Judgement.REFUTED, second.digest: Judgement.HOLDS}
    assert book(tmp_path, network="other").records() == ()


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something holds."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.to_thread(lambda: None)


async def never(seconds: float) -> None:
    await asyncio.Event().wait()


def test_everybody_hears_and_a_newcomer_asks_for_what_was_said_before(tmp_path: Path) -> None:
    wide = Kind(name="numbers", read=number, of_one=200, of_all=500)
    fabric = Fabric(seed=3)
    books = [book(tmp_path / str(n), wide) for n in range(3)]

    async def story() -> None:
        async with AsyncExitStack() as stack:
            gossips = []
            for key, held in zip(KEYS, books, strict=False):
                network = MemoryNetwork(fabric, key.peer_id)
                gossip = RecordGossip(network, held, key, clock=lambda: NOW)
                gossip.start()
                await stack.enter_async_context(network)
                task = asyncio.create_task(gossip.run(never))
                stack.callback(task.cancel)
                gossips.append((gossip, network))
            (first, one), (_, two), (_, three) = gossips
            for n in range(150):  # more than one page of answers
                books[0].admit(said(KEYS[5], n, at=NOW - n), NOW)
            await two.connect(one.addresses()[0])
            await until(lambda: len(books[1].records()) == 150)
            await first.say(7)
            await until(lambda: len(books[1].records()) == 151)
            await three.connect(two.addresses()[0])
            await until(lambda: len(books[2].records()) == 151)
            for payload, reason in (
                (canonical({"network": "other", "after": ""}), Reason.WRONG_NETWORK),
                (b"[]", Reason.MALFORMED),
            ):
                with pytest.raises(Refused) as refused:
                    await three.request(two.peer_id, "/weft/numbers/1", payload, deadline=5.0)
                assert refused.value.reason is reason

    asyncio.run(story())
    assert books[0].envelopes() == books[1].envelopes() == books[2].envelopes()


def test_a_peer_whose_pages_do_not_move_on_is_left_alone(tmp_path: Path) -> None:
    asked: list[bytes] = []

    async def again(peer: PeerId, payload: bytes) -> bytes:
        asked.append(payload)
        return canonical({"records": [], "next": "a place"})

    async def ignore(author: PeerId, data: bytes) -> None:
        raise AssertionError("nothing was said")

    async def story() -> None:
        fabric = Fabric(seed=4)
        async with AsyncExitStack() as stack:
            mine, theirs = (MemoryNetwork(fabric, key.peer_id) for key in KEYS[:2])
            gossip = RecordGossip(mine, book(tmp_path), KEYS[0], clock=lambda: NOW)
            gossip.start()
            theirs.subscribe("/weft/test/numbers/1", lambda author, data: Verdict.IGNORE, ignore)
            theirs.handle("/weft/numbers/1", again)
            for network in (mine, theirs):
                await stack.enter_async_context(network)
            begun, due = asyncio.Event(), asyncio.Event()

            async def sleep(seconds: float) -> None:
                begun.set()
                await due.wait()
                due.clear()

            task = asyncio.create_task(gossip.run(sleep))
            stack.callback(task.cancel)
            await mine.connect(theirs.addresses()[0])
            await until(lambda: len(asked) == 2)
            await begun.wait()
            due.set()
            await until(lambda: len(asked) == 4)  # everybody is asked again now and then
            await asyncio.gather(*(asyncio.to_thread(lambda: None) for _ in range(20)))
            assert len(asked) == 4

    asyncio.run(story())
