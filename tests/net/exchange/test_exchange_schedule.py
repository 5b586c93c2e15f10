"""The pure scheduler: stories with a clock of our own, and what holds whatever peers do."""

from collections import Counter
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from node.domain.ids import PeerId
from node.errors import PeerError, Unreachable
from node.exchange.schedule import MAX_OUTAGES, SHARD_LEAVES, Patience, Schedule, Shard

A, B, C = (PeerId("12D3KooW" + letter * 44) for letter in "ABC")
LATE = Unreachable("late")


def bring(schedule: Schedule, shard: Shard, now: float, *, each: float, count: int = 1000) -> float:
    """Let a shard's leaves arrive, one every `each` seconds; return the time afterwards."""
    for leaf in [leaf for leaf in shard.leaves if leaf in shard.pending][:count]:
        now += each
        schedule.arrived(shard, leaf, now)
    return now


def drain(schedule: Schedule, peer: PeerId, now: float, *, each: float) -> float:
    """Let a peer bring all that it is asked for; return the time afterwards."""
    while shard := schedule.next(peer, now):
        now = bring(schedule, shard, now, each=each)
        schedule.release(shard)
    return now


def test_lanes_share_the_leaves_in_order() -> None:
    schedule = Schedule(range(100), [A, B])
    first, second = schedule.next(A, 0.0, lanes=2), schedule.next(B, 0.0, lanes=2)
    assert first and first.leaves == tuple(range(SHARD_LEAVES))
    assert second and second.leaves == tuple(range(SHARD_LEAVES, 2 * SHARD_LEAVES))


def test_few_leaves_are_spread_over_all_lanes() -> None:
    schedule = Schedule(range(8), [A, B])
    shards = [schedule.next(peer, 0.0, lanes=2) for peer in (A, B, A, B)]
    assert all(shard and len(shard.leaves) <= 2 for shard in shards)


def test_a_liars_leaves_go_to_somebody_else_and_it_is_never_asked_again() -> None:
    schedule = Schedule(range(4), [A, B])
    shard = schedule.next(A, 0.0)
    assert shard
    schedule.drop(A, PeerError("lied"))
    assert not schedule.wanted(shard)
    schedule.release(shard)
    assert schedule.next(A, 1000.0) is None
    other = schedule.next(B, 0.0)
    assert other and set(other.leaves) == {0, 1, 2, 3}
    bring(schedule, other, 0.0, each=0.1)
    assert schedule.done and not schedule.stuck


def test_an_outage_rests_a_peer_longer_each_time_and_ends_it_at_last() -> None:
    schedule = Schedule(range(4), [A], patience=Patience(rest=1.0))
    now = 0.0
    for outage in range(MAX_OUTAGES):
        shard = schedule.next(A, now)
        assert shard is not None
        schedule.outage(shard, LATE, now)
        schedule.release(shard)
        rest = 2.0**outage
        assert schedule.next(A, now + rest - 0.01) is None
        now += rest
    assert schedule.stuck and schedule.dropped == {A: LATE}


def test_one_outage_of_many_lanes_counts_once_and_a_leaf_makes_up_for_it() -> None:
    schedule = Schedule(range(100), [A])
    lanes = [schedule.next(A, 0.0, lanes=4) for _ in range(4)]
    for shard in lanes:
        assert shard
        schedule.outage(shard, LATE, 10.0)
        schedule.release(shard)
    now = 10.0
    for _ in range(2 * MAX_OUTAGES):
        now += 1.0
        again = schedule.next(A, now)
        assert again, "it was one outage, and it rested for one second"
        now = bring(schedule, again, now, each=0.1, count=1)
        schedule.outage(again, LATE, now)
        schedule.release(again)
    assert not schedule.dropped


def test_a_fast_peer_takes_over_the_far_end_of_a_slow_peers_shard() -> None:
    schedule = Schedule(range(32), [A, B])
    slow = schedule.next(A, 0.0)
    assert slow and len(slow.leaves) == 16
    now = drain(schedule, B, 0.0, each=0.01)
    assert not schedule.done, "nobody is late yet"
    schedule.arrived(slow, slow.leaves[0], 5.0)
    stolen = schedule.next(B, now + 5.0)
    assert stolen and stolen.leaves == tuple(sorted(slow.leaves[1:], reverse=True))
    assert schedule.arrived(stolen, stolen.leaves[0], 5.21)
    assert not schedule.arrived(slow, stolen.leaves[0], 5.22), "it was there already"
    bring(schedule, stolen, 5.22, each=0.01)
    assert schedule.done and not schedule.wanted(slow)


def test_equally_fast_peers_do_not_fetch_twice() -> None:
    schedule = Schedule(range(32), [A, B])
    one = schedule.next(A, 0.0)
    assert one
    now = drain(schedule, B, 0.0, each=0.1)
    bring(schedule, one, 0.1, each=0.1, count=14)
    assert schedule.next(B, now) is None


def test_nobody_is_the_measure_of_his_own_slowness() -> None:
    schedule = Schedule(range(64), [A, B], patience=Patience(floor=1.0, initial=10.0, ceiling=60.0))
    assert schedule.patience(A) == 10.0
    slow, fast = schedule.next(A, 0.0), schedule.next(B, 0.0)
    assert slow and fast
    bring(schedule, slow, 0.0, each=20.0, count=5)
    assert schedule.patience(A) == 20.0, "alone, it sets its own pace"
    bring(schedule, fast, 0.0, each=0.25)
    assert schedule.patience(A) == 5.0
    assert schedule.patience(B) == 1.0


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_every_leaf_is_got_or_everybody_is_out(seed: int) -> None:
    """Whatever order of arrivals, outages, lies and releases: no leaf is lost, no liar asked again."""
    draw = Random(seed)
    leaves = draw.randint(0, 40)
    peers = [A, B, C][: draw.randint(1, 3)]
    schedule = Schedule(range(leaves), peers, patience=Patience(rest=0.5))
    running: list[Shard] = []
    liars: set[PeerId] = set()
    got: Counter[int] = Counter()
    now = 0.0
    for _ in range(400):
        if schedule.done or schedule.stuck:
            break
        now += draw.choice([0.01, 0.5, 3.0])
        choice = draw.randint(0, 9)
        if choice < 3 or not running:
            peer = draw.choice(peers)
            shard = schedule.next(peer, now, lanes=draw.randint(1, 3))
            if shard:
                assert peer not in liars and shard.leaves
                assert len(set(shard.leaves)) == len(shard.leaves)
                running.append(shard)
            continue
        shard = draw.choice(running)
        if choice < 8 and shard.pending:
            leaf = next(leaf for leaf in shard.leaves if leaf in shard.pending)
            got[leaf] += schedule.arrived(shard, leaf, now)
            continue
        if choice == 8 and len(liars) + 1 < len(peers):
            schedule.drop(shard.peer, PeerError("lied"))
            liars.add(shard.peer)
        elif choice == 8:
            schedule.outage(shard, LATE, now)
        schedule.release(shard)
        running.remove(shard)
    assert all(count == 1 for count in got.values()), "a leaf is new exactly once"
    for shard in running:
        schedule.release(shard)
    for _ in range(200):
        if schedule.done or schedule.stuck:
            break
        now += 100.0
        for peer in peers:
            shard = schedule.next(peer, now)
            if shard:
                for leaf in shard.leaves:
                    got[leaf] += schedule.arrived(shard, leaf, now)
                schedule.release(shard)
    assert schedule.stuck or set(+got) == set(range(leaves))
    assert schedule.stuck == (not schedule.done)
