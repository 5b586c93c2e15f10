"""Asking many peers: those that stay silent cost their turn, and nobody waits for more than is needed."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import LocalError, PeerError, Refused, Unreachable, WeftError
from node.identity.keys import HostKey
from node.merging.canvass import Pace, canvass

pytestmark = pytest.mark.anyio
HASTY = Pace(at_once=8, turn=0.02, grace=0.02, total=5.0)
PEERS = [HostKey.generate().peer_id for _ in range(100)]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Crowd:
    """Peers that answer, say no or say nothing; `asked` is who was asked, `most` how many at once."""

    def __init__(self, honest: set[PeerId], says: Callable[[PeerId], Awaitable[None]]) -> None:
        self.honest = honest
        self.says = says
        self.asked: list[PeerId] = []
        self.granted: list[PeerId] = []
        self.at_once = self.most = 0

    async def ask(self, peer: PeerId) -> None:
        self.asked.append(peer)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            if peer not in self.honest:
                await self.says(peer)
            self.granted.append(peer)
        finally:
            self.at_once -= 1

    async def canvass(self, pace: Pace = HASTY, enough: int = 4) -> dict[PeerId, WeftError]:
        return await canvass(
            PEERS,
            self.ask,
            some=lambda: bool(self.granted),
            enough=lambda: len(self.granted) >= enough,
            pace=pace,
        )


async def silence(peer: PeerId) -> None:
    await asyncio.Event().wait()


async def test_one_honest_peer_is_found_behind_a_crowd_of_silent_ones() -> None:
    crowd = Crowd({PEERS[-1]}, silence)
    failed = await crowd.canvass()
    assert crowd.granted == [PEERS[-1]]
    assert len(failed) > 80 and all(isinstance(error, Unreachable) for error in failed.values())
    assert crowd.most == HASTY.at_once and crowd.at_once == 0


async def test_nobody_waits_for_the_silent_once_enough_have_answered() -> None:
    crowd = Crowd(set(PEERS[5:12]), silence)
    patient = Pace(at_once=8, turn=600.0, grace=600.0, total=600.0)
    async with asyncio.timeout(5):
        await crowd.canvass(patient, enough=3)
    assert set(crowd.granted) <= set(PEERS[5:12]) and len(crowd.granted) >= 3
    assert len(crowd.asked) < 20 and crowd.at_once == 0


async def test_one_answer_is_waited_with_for_a_moment_only() -> None:
    crowd = Crowd({PEERS[0]}, silence)
    async with asyncio.timeout(5):
        await crowd.canvass(Pace(turn=600.0, grace=0.02, total=600.0))
    assert crowd.granted == [PEERS[0]] and crowd.at_once == 0


async def test_all_silent_peers_together_take_a_fixed_time() -> None:
    crowd = Crowd(set(), silence)
    async with asyncio.timeout(5):
        assert await crowd.canvass(Pace(at_once=2, turn=600.0, total=0.05)) == {}
    assert len(crowd.asked) == 2 and crowd.at_once == 0


async def test_how_each_peer_failed_is_told_and_our_own_faults_are_raised() -> None:
    answers = [Refused(Reason.BUSY), PeerError("nonsense"), Unreachable("gone")]

    async def refuse(peer: PeerId) -> None:
        raise answers[PEERS.index(peer) % 3]

    failed = await Crowd(set(), refuse).canvass()
    assert failed == {peer: answers[n % 3] for n, peer in enumerate(PEERS)}

    async def break_down(peer: PeerId) -> None:
        raise LocalError("the disk is full")

    with pytest.raises(LocalError):
        await Crowd(set(), break_down).canvass()
    assert await canvass([], silence, some=lambda: False, enough=lambda: False, pace=HASTY) == {}
