"""The advert book: replay, rollback, expiry, contradiction and restart, one by one and in every order."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from merge_core.digest import Digest, ModelId, canonical, parse_canonical, sha256
from node.catalog.book import FORGET_AFTER, START, AdvertBook, Outcome, Query, read
from node.catalog.room import LEAST, leaving
from node.domain.advert import (
    MAX_ENVELOPE,
    MAX_LIFETIME,
    PAYLOAD_TYPE,
    Advert,
    AdvertisedModel,
    Link,
    announcement,
    contradict,
)
from node.domain.negotiation import Purpose
from node.identity.envelopes import Envelope, seal
from node.identity.keys import HostKey
from node.store import Store

NOW = 1_760_000_000
ME, ALICE, BOB, MALLORY = (HostKey.from_private_bytes(bytes([n]) * 32) for n in range(1, 5))


def model(number: int, **more: object) -> AdvertisedModel:
    known = AdvertisedModel(
        model_id=ModelId(sha256(b"model %d" % number)),
        name=f"expert {number}",
        licence="Apache-2.0",
        architecture="LlamaForCausalLM",
        base=None,
        size=1 << 20,
        fingerprint=sha256(b"fingerprint"),
        sketch=sha256(b"sketch"),
        publisher=sha256(b"publisher"),
        purposes=(Purpose.AUDIT, Purpose.MERGE),
    )
    return replace(known, **more)  # type: ignore[arg-type]


def sealed(advert: Advert, key: HostKey) -> bytes:
    return seal(PAYLOAD_TYPE, advert.to_bytes(), key).to_bytes()


def said(
    key: HostKey, *numbers: int, now: int = NOW, last: Advert | None = None, lifetime: int = 3600
) -> Advert:
    """A one-part announcement."""
    link = Link(seq=last.seq, digest=last.digest) if last else None
    (advert,) = announcement(
        [model(n) for n in numbers], network="demo", peer=key.peer_id, last=link, now=now, lifetime=lifetime
    )
    return advert


def names(book: AdvertBook, now: float = NOW) -> list[str]:
    return [listing.model.name for listing in book.search(Query(), now)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "node.db")


@pytest.fixture
def book(store: Store) -> AdvertBook:
    return AdvertBook(store, network="demo", me=ME.peer_id)


def test_a_newer_announcement_replaces_all_that_a_peer_said(book: AdvertBook) -> None:
    first = said(ALICE, 1, 2)
    second = said(ALICE, 3, now=NOW + 5, last=first)
    assert book.admit(sealed(first, ALICE), NOW).outcome is Outcome.NEW
    assert book.admit(sealed(first, ALICE), NOW).outcome is Outcome.KNOWN
    assert book.admit(sealed(second, ALICE), NOW + 5).outcome is Outcome.NEW
    assert names(book, NOW + 5) == ["expert 3"]
    assert book.admit(sealed(said(ALICE, now=NOW + 9, last=second), ALICE), NOW + 9).outcome is Outcome.NEW
    assert names(book, NOW + 9) == []


def test_an_older_advert_is_not_taken_even_after_a_restart(book: AdvertBook, store: Store) -> None:
    oldest = said(ALICE, 1)
    middle = said(ALICE, 2, now=NOW + 10, last=oldest)
    newest = said(ALICE, 3, now=NOW + 20, last=middle, lifetime=60)
    for advert in (middle, newest):
        book.admit(sealed(advert, ALICE), NOW + 20)
    assert book.admit(sealed(oldest, ALICE), NOW + 20).outcome is Outcome.OLD
    book.forget(NOW + 200)
    again = AdvertBook(store, network="demo", me=ME.peer_id)
    assert again.admit(sealed(oldest, ALICE), NOW + 200).outcome is Outcome.OLD
    assert names(again, NOW + 200) == [], "what came before the expired advert must not come back"


def test_a_number_outlives_its_advert(book: AdvertBook) -> None:
    long = said(ALICE, 1, lifetime=MAX_LIFETIME)
    withdrawn = said(ALICE, now=NOW + 10, last=long, lifetime=1)
    book.admit(sealed(withdrawn, ALICE), NOW + 10)
    book.forget(NOW + 20)
    assert book.admit(sealed(long, ALICE), NOW + 20).outcome is Outcome.OLD


def test_an_expired_advert_is_neither_offered_nor_taken(book: AdvertBook) -> None:
    advert = said(ALICE, 1, lifetime=60)
    book.admit(sealed(advert, ALICE), NOW)
    assert names(book, NOW + 59) == ["expert 1"] and names(book, NOW + 60) == []
    assert book.admit(sealed(said(BOB, 1, lifetime=60), BOB), NOW + 60).outcome is Outcome.EXPIRED


def test_what_does_not_belong_here_counts_against_its_sender(book: AdvertBook) -> None:
    advert = said(ALICE, 1)
    future = said(ALICE, 1, now=NOW + 1000)
    other = replace(advert, network="other")
    data = sealed(advert, ALICE)
    twice = Envelope.parse(data)
    both = replace(
        twice,
        signatures={**twice.signatures, **seal(PAYLOAD_TYPE, twice.payload, BOB).signatures},
    )
    for wrong, outcome in (
        (sealed(advert, BOB), Outcome.MALFORMED),
        (both.to_bytes(), Outcome.MALFORMED),
        (data[:-1], Outcome.MALFORMED),
        (data + b" " * MAX_ENVELOPE, Outcome.MALFORMED),
        (seal("application/json", advert.to_bytes(), ALICE).to_bytes(), Outcome.MALFORMED),
        (sealed(future, ALICE), Outcome.FUTURE),
        (sealed(other, ALICE), Outcome.WRONG_NETWORK),
    ):
        found = book.admit(wrong, NOW)
        assert found.outcome is outcome and outcome.counts_against
    assert names(book) == []


def test_two_adverts_with_one_number_are_a_proof_that_others_accept(book: AdvertBook, tmp_path: Path) -> None:
    one, other = said(MALLORY, 1), said(MALLORY, 2)
    assert one.seq == other.seq
    book.admit(sealed(one, MALLORY), NOW)
    found = book.admit(sealed(other, MALLORY), NOW)
    assert found.outcome is Outcome.CONTRADICTION and found.proof is not None
    assert names(book) == [] and book.banned(MALLORY.peer_id)
    elsewhere = AdvertBook(Store(tmp_path / "elsewhere.db"), network="demo", me=BOB.peer_id)
    told = [data for _, data in book.envelopes(NOW)]
    assert told == list(found.proof)
    assert elsewhere.admit(told[0], NOW).outcome is Outcome.NEW
    assert elsewhere.admit(told[1], NOW).outcome is Outcome.CONTRADICTION
    assert elsewhere.admit(sealed(said(MALLORY, 3, now=NOW + 9), MALLORY), NOW + 9).outcome is Outcome.BANNED
    assert elsewhere.contradictions() == {MALLORY.peer_id: found.proof}


def test_a_broken_chain_is_a_contradiction(book: AdvertBook) -> None:
    one = said(MALLORY, 1)
    after = replace(said(MALLORY, 2), seq=one.seq + 1, previous=sha256(b"another history"))
    book.admit(sealed(one, MALLORY), NOW)
    assert book.admit(sealed(after, MALLORY), NOW).outcome is Outcome.CONTRADICTION


def test_many_experts_are_said_in_parts_that_may_arrive_in_any_order(book: AdvertBook) -> None:
    parts = announcement(
        [model(n) for n in range(200)], network="demo", peer=ALICE.peer_id, last=None, now=NOW
    )
    assert len(parts) > 2 and {advert.first_seq for advert in parts} == {NOW}
    for advert in reversed(parts):
        data = sealed(advert, ALICE)
        assert len(data) <= MAX_ENVELOPE
        assert book.admit(data, NOW).outcome is Outcome.NEW
    assert len(names(book)) == 200
    assert [read(data) for _, data in book.envelopes(NOW)] == list(parts)


def test_a_node_restored_from_a_backup_is_heard_and_not_banned(book: AdvertBook, tmp_path: Path) -> None:
    mine = AdvertBook(Store(tmp_path / "a.db"), network="demo", me=ALICE.peer_id)
    (before,) = mine.announce([model(1)], ALICE, NOW)
    restored = AdvertBook(Store(tmp_path / "b.db"), network="demo", me=ALICE.peer_id)
    (after,) = restored.announce([model(2)], ALICE, NOW + 60)
    assert book.admit(before, NOW).outcome is book.admit(after, NOW + 60).outcome is Outcome.NEW
    assert names(book, NOW + 60) == ["expert 2"]


def test_what_this_node_says_is_chained_and_listed_but_not_taken_from_others(tmp_path: Path) -> None:
    book = AdvertBook(Store(tmp_path / "a.db"), network="demo", me=ME.peer_id)
    (first,) = book.announce([model(1)], ME, NOW)
    (second,) = book.announce([model(1), model(2)], ME, NOW)
    assert read(second).previous == read(first).digest and read(second).seq == read(first).seq + 1
    assert names(book) == ["expert 1", "expert 2"]
    assert book.admit(first, NOW).outcome is Outcome.OWN
    assert not contradict(read(first), read(second))


def test_a_search_narrows_by_every_field(book: AdvertBook) -> None:
    base = ModelId(sha256(b"base"))
    models = [
        model(1, name="maths", base=base),
        model(2, name="code", licence="MIT", purposes=(Purpose.MIRROR,)),
        model(3, name="prose", architecture="Qwen3ForCausalLM"),
    ]
    (advert,) = announcement(models, network="demo", peer=ALICE.peer_id, last=None, now=NOW)
    book.admit(sealed(advert, ALICE), NOW)
    for query, expected in (
        (Query(text="MATH"), ["maths"]),
        (Query(text="llama apache"), ["maths"]),
        (Query(licence="mit"), ["code"]),
        (Query(base=base), ["maths"]),
        (Query(purpose=Purpose.MIRROR), ["code"]),
        (Query(architecture="qwen3forcausallm"), ["prose"]),
        (Query(model_id=models[1].model_id), ["code"]),
        (Query(publisher=models[0].publisher), ["code", "maths", "prose"]),
        (Query(peer=BOB.peer_id), []),
    ):
        assert [x.model.name for x in book.search(query, NOW)] == expected


def test_strangers_wait_when_the_book_is_full(store: Store) -> None:
    book = AdvertBook(store, network="demo", me=ME.peer_id, room=LEAST)
    first = said(ALICE, 1)
    book.admit(sealed(first, ALICE), NOW)
    assert book.admit(sealed(said(BOB, 1), BOB), NOW).outcome is Outcome.FULL
    assert book.admit(sealed(said(ALICE, 2, last=first), ALICE), NOW).outcome is Outcome.NEW
    late = NOW + 4 * MAX_LIFETIME
    assert book.admit(sealed(said(BOB, 1, now=late), BOB), late).outcome is Outcome.NEW


def test_a_full_book_costs_a_stranger_more_than_the_node(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = AdvertBook(store, network="demo", me=ME.peer_id, room=2 * LEAST)
    for key in (ALICE, BOB):
        book.admit(sealed(said(key, 1), key), NOW)
    strangers = [HostKey.from_private_bytes(bytes([n]) * 32) for n in range(10, 20)]
    messages = [sealed(said(key, 1), key) for key in strangers]
    checked, asked = [], []
    monkeypatch.setattr("node.catalog.book.read", lambda data: checked.append(data) or read(data))
    monkeypatch.setattr(
        "node.catalog.book.leaving", lambda *a, now, **more: asked.append(now) or leaving(*a, now=now, **more)
    )
    for data in messages:
        assert book.admit(data, NOW + 1).outcome is Outcome.FULL
    assert checked == messages, "nothing but what arrives is verified"
    assert asked == [NOW + 1], "what cannot have changed is not looked for again"


def test_a_full_book_has_room_from_the_second_on_when_an_advert_expires(store: Store) -> None:
    book = AdvertBook(store, network="demo", me=ME.peer_id, room=LEAST)
    book.announce([model(9)], ME, NOW)
    first = said(ALICE, 1, lifetime=60)
    book.admit(sealed(first, ALICE), NOW)
    free = NOW + 60
    for moment, outcome in ((NOW, Outcome.FULL), (free - 1, Outcome.FULL), (free, Outcome.NEW)):
        assert book.admit(sealed(said(BOB, 1, now=moment), BOB), moment).outcome is outcome
    assert names(book, free) == names(AdvertBook(store, network="demo", me=ME.peer_id), free)


def crowd(count: int, *, start: int = 100) -> list[HostKey]:
    return [HostKey.from_private_bytes((start + n).to_bytes(32, "big")) for n in range(count)]


def test_a_crowd_of_strangers_keeps_nobody_out_who_is_connected(store: Store) -> None:
    strangers = crowd(8)
    book = AdvertBook(store, network="demo", me=ME.peer_id, room=8 * LEAST)
    for key in strangers:
        assert book.admit(sealed(said(key), key), NOW, told_by=MALLORY.peer_id).outcome is Outcome.NEW
    here = {ALICE.peer_id}.__contains__
    assert book.admit(sealed(said(BOB, 1), BOB), NOW, connected=here).outcome is Outcome.FULL
    for sender in (ALICE, BOB):  # of Bob, Alice tells
        data = sealed(said(sender, 1), sender)
        found = book.admit(data, NOW, told_by=ALICE.peer_id, connected=here)
        assert found.outcome is Outcome.NEW
    again = AdvertBook(store, network="demo", me=ME.peer_id, room=8 * LEAST)
    for view in (book, again):
        assert len(view.envelopes(NOW)) == 8 and names(view) == ["expert 1", "expert 1"]
    assert again.admit(sealed(said(MALLORY, 1), MALLORY), NOW).outcome is Outcome.FULL


def test_a_connection_that_tells_of_a_crowd_shares_with_the_others(store: Store) -> None:
    book = AdvertBook(store, network="demo", me=ME.peer_id, room=8 * LEAST)
    here = {ALICE.peer_id, MALLORY.peer_id}.__contains__

    def tell(keys: list[HostKey], by: HostKey) -> list[Outcome]:
        times = [NOW + 60 * n for n in range(len(keys))]
        return [
            book.admit(sealed(said(key), key), now, told_by=by.peer_id, connected=here).outcome
            for key, now in zip(keys, times, strict=True)
        ]

    assert tell(crowd(12), MALLORY) == [Outcome.NEW] * 8 + [Outcome.FULL] * 4
    assert tell(crowd(6, start=200), ALICE) == [Outcome.NEW] * 4 + [Outcome.FULL] * 2
    told = {place[0] for place, _ in book.envelopes(NOW)}
    assert told == {key.peer_id for key in (*crowd(4), *crowd(4, start=200))}, "who came first stays"


def test_what_is_stored_of_all_together_is_bounded(store: Store) -> None:
    book = AdvertBook(store, network="demo", me=ME.peer_id, room=20 * LEAST)
    for key in crowd(6):
        parts = announcement(
            [model(n) for n in range(300)], network="demo", peer=key.peer_id, last=None, now=NOW
        )
        for advert in parts:
            book.admit(sealed(advert, key), NOW)
    size = sum(len(data) for _, data in book.envelopes(NOW))
    assert 10 * LEAST < size <= 20 * LEAST
    here = {ALICE.peer_id}.__contains__
    data = sealed(said(ALICE, 1), ALICE)
    assert book.admit(data, NOW, told_by=ALICE.peer_id, connected=here).outcome is Outcome.NEW


def test_who_contradicts_itself_takes_no_more_room_than_the_proof(store: Store) -> None:
    book = AdvertBook(store, network="demo", me=ME.peer_id, room=3 * LEAST)
    one, two = (said(MALLORY, *range(n, n + 30)) for n in (0, 50))
    for advert in (one, two):
        book.admit(sealed(advert, MALLORY), NOW)
    assert book.banned(MALLORY.peer_id) and len(sealed(one, MALLORY)) > LEAST
    assert book.admit(sealed(said(BOB, 1), BOB), NOW).outcome is Outcome.FULL
    here = {ALICE.peer_id}.__contains__
    assert book.admit(sealed(said(ALICE, 1), ALICE), NOW, connected=here).outcome is Outcome.NEW
    assert not book.banned(MALLORY.peer_id) and not book.contradictions()


def test_a_proof_is_forgotten_with_the_numbers_of_the_liar(book: AdvertBook, store: Store) -> None:
    for number in (1, 2):
        book.admit(sealed(said(MALLORY, number, lifetime=60), MALLORY), NOW)
    book.forget(NOW + 60 + FORGET_AFTER - 1)
    assert book.banned(MALLORY.peer_id) and book.contradictions()
    book.forget(NOW + 60 + FORGET_AFTER)
    assert not book.banned(MALLORY.peer_id) and not book.contradictions()


def test_adverts_are_told_page_by_page_each_once(book: AdvertBook) -> None:
    for key in (ALICE, BOB):
        first = said(key, 1)
        for advert in (first, said(key, 2, now=NOW + 5, last=first)):
            book.admit(sealed(advert, key), NOW + 5)
    for number in (1, 2):
        book.admit(sealed(said(MALLORY, number), MALLORY), NOW + 5)
    whole = book.envelopes(NOW + 5)
    assert len(whole) == 4 and [place for place, _ in whole] == sorted(place for place, _ in whole)
    paged, after = [], START
    while page := book.envelopes(NOW + 5, after=after, limit=1):
        paged += page
        after = page[-1][0]
    assert tuple(paged) == whole
    assert book.envelopes(NOW + 5 + MAX_LIFETIME, limit=1)[0][0][0] == MALLORY.peer_id


def test_true_is_no_version(book: AdvertBook) -> None:
    document = parse_canonical(said(ALICE, 1).to_bytes())
    with pytest.raises(ValueError, match="version True"):
        Advert.parse(canonical(document | {"version": True}))


hostile = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["seq", "models", "peerId", "issuedAt", "expiresAt", "parts", "part"]), hostile)
def test_a_hostile_field_is_a_value_error(name: str, value: object) -> None:
    import json

    document = json.loads(said(ALICE, 1).to_bytes())
    document[name] = value
    try:
        advert = Advert.parse(json.dumps(document, separators=(",", ":"), sort_keys=True).encode())
    except ValueError:
        return
    assert Advert.parse(advert.to_bytes()) == advert


@given(st.lists(st.integers(0, 10_000), max_size=60, unique=True), st.integers(0, 2**40))
def test_an_announcement_survives_its_bytes_and_is_a_chain(numbers: list[int], last: int) -> None:
    link = Link(seq=last, digest=Digest(sha256(b"before")))
    parts = announcement([model(n) for n in numbers], network="demo", peer=ALICE.peer_id, last=link, now=NOW)
    assert [Advert.parse(advert.to_bytes()) for advert in parts] == list(parts)
    assert parts[0].previous == link.digest and parts[0].seq == max(NOW, last + 1)
    for before, after in pairwise(parts):
        assert (after.seq, after.previous) == (before.seq + 1, before.digest)
    assert sorted(m.model_id for advert in parts for m in advert.models) == sorted(
        model(n).model_id for n in numbers
    )


class Gossip(RuleBasedStateMachine):
    """Honest peers announce, one lies, the wire repeats and reorders, the node restarts; time passes."""

    KEYS = (ALICE, BOB, MALLORY)

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.now = NOW
        self.wire: list[tuple[Advert, bytes]] = []
        self.last: dict[str, Advert] = {}
        self.taken: dict[str, dict[int, Advert]] = {key.peer_id: {} for key in self.KEYS}
        self.liars: set[str] = set()
        self.store = Store(Path(self.folder.name) / "node.db")
        self.book = AdvertBook(self.store, network="demo", me=ME.peer_id)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()

    @rule(
        who=st.sampled_from(KEYS),
        count=st.sampled_from([0, 1, 3, 120]),
        lifetime=st.integers(1, 40),
        heard=st.booleans(),
    )
    def announce(self, who: HostKey, count: int, lifetime: int, heard: bool) -> None:
        last = self.last.get(who.peer_id)
        link = Link(seq=last.seq, digest=last.digest) if last else None
        models = [model(len(self.wire) * 1000 + n) for n in range(count)]
        for advert in announcement(
            models, network="demo", peer=who.peer_id, last=link, now=self.now, lifetime=lifetime
        ):
            self.wire.append((advert, sealed(advert, who)))
            self.last[who.peer_id] = advert
            if heard:
                self.take(*self.wire[-1])

    @precondition(lambda self: self.wire)
    @rule(picks=st.lists(st.integers(0, 1000), min_size=1, max_size=6))
    def deliver(self, picks: list[int]) -> None:
        for pick in picks:
            self.take(*self.wire[-1 - pick % len(self.wire)])

    @precondition(lambda self: self.wire)
    @rule(pick=st.integers(0, 1000), at=st.integers(0, 10_000))
    def corrupt(self, pick: int, at: int) -> None:
        _, envelope = self.wire[pick % len(self.wire)]
        at %= len(envelope)
        flipped = envelope[:at] + bytes([envelope[at] ^ 1]) + envelope[at + 1 :]
        assert self.book.admit(flipped, self.now).outcome is Outcome.MALFORMED

    @rule()
    def lie(self) -> None:
        """The liar says something else under its newest number, to a node that has heard the first."""
        self.announce(MALLORY, 1, 40, heard=True)
        last = self.last[MALLORY.peer_id]
        twin = replace(last, models=(model(999_999),))
        outcome = self.book.admit(sealed(twin, MALLORY), self.now).outcome
        assert outcome in (Outcome.CONTRADICTION, Outcome.BANNED)
        self.liars.add(MALLORY.peer_id)

    @rule(seconds=st.integers(1, 30))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = Store(Path(self.folder.name) / "node.db")
        self.book = AdvertBook(self.store, network="demo", me=ME.peer_id)

    @rule()
    def forget(self) -> None:
        self.book.forget(self.now)

    def take(self, advert: Advert, envelope: bytes) -> None:
        outcome = self.book.admit(envelope, self.now).outcome
        newest = max((known.first_seq for known in self.taken[advert.peer].values()), default=0)
        if advert.peer in self.liars or advert.expires_at <= self.now:
            assert outcome in (Outcome.BANNED, Outcome.EXPIRED)
        elif advert.first_seq < newest:
            assert outcome in (Outcome.OLD, Outcome.KNOWN)
        else:
            assert outcome in (Outcome.NEW, Outcome.KNOWN)
            self.taken[advert.peer][advert.seq] = advert

    @invariant()
    def offers_exactly_the_newest_announcements(self) -> None:
        if not hasattr(self, "book"):
            return
        expected = set()
        for peer, known in self.taken.items():
            newest = max((advert.first_seq for advert in known.values()), default=0)
            for advert in known.values():
                if peer not in self.liars and advert.first_seq == newest and advert.expires_at > self.now:
                    expected |= {(peer, m.model_id) for m in advert.models}
        found = self.book.listings(self.now)
        assert {(x.peer, x.model.model_id) for x in found} == expected
        assert not any(self.book.banned(key.peer_id) for key in (ALICE, BOB))
        assert all(self.book.banned(key.peer_id) == (key.peer_id in self.liars) for key in self.KEYS)


TestGossip = Gossip.TestCase
TestGossip.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
