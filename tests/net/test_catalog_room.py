"""Room in the advert book: whoever leaves makes enough room and no more, and crowds leave first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.catalog.room import LEAST, Ledger, Tenant, leaving, side
from node.domain.ids import PeerId
from node.identity.keys import HostKey

PEERS = [HostKey.from_private_bytes(bytes([n]) * 32).peer_id for n in range(1, 13)]
NOW = 1000.0

tenants_of = st.builds(
    Tenant,
    size=st.integers(0, 4 * LEAST),
    expires_at=st.sampled_from([900, 950, 2000]),
    told_by=st.none() | st.sampled_from(PEERS),
)
books = st.dictionaries(st.sampled_from(PEERS), tenants_of, max_size=10)


@given(books, st.sampled_from(PEERS), tenants_of, st.frozensets(st.sampled_from(PEERS)), st.integers(1, 20))
def test_as_many_leave_as_the_guest_needs(
    tenants: dict[PeerId, Tenant], guest: PeerId, wanted: Tenant, here: frozenset[PeerId], places: int
) -> None:
    connected, room = here.__contains__, places * LEAST
    gone = leaving(tenants, guest, wanted, now=NOW, connected=connected, room=room)
    stay = {peer: t for peer, t in tenants.items() if peer != guest}
    if gone is None:
        live = {p: t for p, t in stay.items() if t.expires_at > NOW}
        assert sum(t.cost for t in live.values()) + wanted.cost > room, "the expired make room for anybody"
        if guest in here and live:
            there = sum(t.cost for p, t in live.items() if p in here)
            assert there + wanted.cost > room, "who is not connected makes room for who is"
        return
    assert guest not in gone and len(set(gone)) == len(gone) and stay.keys() >= set(gone)
    left = sum(t.cost for p, t in stay.items() if p not in gone) + wanted.cost
    assert left <= room and (not gone or left + stay[gone[-1]].cost > room), "nobody leaves for nothing"
    if any(stay[p].expires_at > NOW for p in gone):
        assert all(t.expires_at > NOW or p in gone for p, t in stay.items()), "first the expired"


def test_a_connection_stands_for_whom_it_told_of_as_long_as_it_lasts() -> None:
    here, gone, told = PEERS[:3]
    connected = {here}.__contains__
    assert side(told, here, connected) == here == side(here, gone, connected)
    assert side(told, gone, connected) is side(told, None, connected) is None


@given(
    st.lists(st.tuples(st.sampled_from(PEERS[:3]), st.integers(0, 3), st.integers(0, 2 * LEAST)), max_size=20)
)
def test_the_ledger_adds_up(entries: list[tuple[PeerId, int, int]]) -> None:
    ledger, kept = Ledger(), dict[PeerId, dict[int, int]]()
    for peer, number, size in entries:
        ledger.add(peer, number, size)
        kept.setdefault(peer, {})[number] = size
        if number == 3:
            ledger.retain(peer, {1, 3})
            kept[peer] = {n: s for n, s in kept[peer].items() if n in (1, 3)}
    assert ledger.cost == sum(max(LEAST, sum(sizes.values())) for sizes in kept.values())
    for peer in kept:
        ledger.remove(peer)
    assert ledger.cost == 0
