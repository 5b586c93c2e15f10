"""The control API's part for choosing merges: fingerprints of what is named, partners, faults, outcomes.

It translates and waits for the seeker; what the fingerprints mean is computed by whoever asked.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

from merge_core.errors import CorruptCheckpoint
from merge_core.simmerge.choosing.outcomes import Outcome
from merge_core.simmerge.index import Index
from merge_core.simmerge.mini import Mini
from node.control import views
from node.domain.ids import PeerId
from node.errors import UsageError, WeftError
from node.provenance.fault import Fault, accusations
from node.records.book import RecordBook
from node.records.gossip import RecordGossip
from node.selection import outcomes
from node.selection.candidate import Candidate
from node.selection.seek import Seeker
from node.wire.v1 import selection_pb2 as pb
from node.wire.v1 import selection_pb2_grpc

MAX_CANDIDATES = 64
"""Models that are compared at once."""
MAX_PARTNERS = 100
_SPARE = 4
"""Models that may be asked about for each partner that is wanted: whoever lies in a mini cannot show more."""
_AT_ONCE = 8
_TURN = 20.0
"""Seconds for the fingerprint of one of them."""
MAX_FAULTS = 500


class SelectionServicer(selection_pb2_grpc.SelectionServicer):
    """One method an RPC; errors are raised typed and described by the interceptor."""

    def __init__(
        self,
        me: PeerId,
        seeker: Seeker,
        faults: RecordBook[Fault],
        told: RecordGossip[Outcome],
    ) -> None:
        self._me = me
        self._seeker = seeker
        self._faults = faults
        self._outcomes = told

    async def ReadCandidates(
        self, request: pb.ReadCandidatesRequest, context: Any
    ) -> AsyncIterator[pb.ReadCandidatesResponse]:
        if not 1 <= len(request.references) <= MAX_CANDIDATES:
            raise UsageError(f"1 to {MAX_CANDIDATES} models are compared at once", hint="weft sim --help")
        for found in await asyncio.gather(*map(self._seeker.find, request.references)):
            yield pb.ReadCandidatesResponse(candidate=views.candidate(found))

    async def FindPartners(
        self, request: pb.FindPartnersRequest, context: Any
    ) -> AsyncIterator[pb.FindPartnersResponse]:
        mini, base = _mini(request.sketch), _mini(request.base) if request.base else None
        if not 1 <= request.count <= MAX_PARTNERS:
            raise UsageError(f"1 to {MAX_PARTNERS} partners are told", hint="weft partners --help")
        moved: list[int] = []
        minis = await self._seeker.minis(moved.append)
        index = await asyncio.to_thread(Index, minis)
        ranked = list(await asyncio.to_thread(index.partners, mini, _SPARE * request.count, base=base))
        left = request.count
        while left and ranked:
            size = min(left, _AT_ONCE)
            batch, ranked = ranked[:size], ranked[size:]
            for found in await asyncio.gather(*(self._shown(str(one.mini.model_id)) for one in batch)):
                if found is not None:
                    left -= 1
                    yield pb.FindPartnersResponse(
                        candidate=views.candidate(found), compared=len(index), moved=sum(moved)
                    )

    async def _shown(self, model_id: str) -> Candidate | None:
        """A model whose fingerprint somebody shows in time."""
        try:
            async with asyncio.timeout(_TURN):
                return await self._seeker.find(model_id)
        except (WeftError, TimeoutError):
            return None

    async def ListFaults(self, request: pb.ListFaultsRequest, context: Any) -> pb.ListFaultsResponse:
        said = accusations(self._faults)
        begin = int(request.page_token) if request.page_token.isdigit() else 0
        size = min(MAX_FAULTS, request.page_size) if request.page_size > 0 else MAX_FAULTS
        end = begin + size
        return pb.ListFaultsResponse(
            faults=[views.fault(accusation) for accusation in said[begin:end]],
            next_page_token=str(end) if end < len(said) else "",
        )

    async def ListOutcomes(
        self, request: pb.ListOutcomesRequest, context: Any
    ) -> AsyncIterator[pb.ListOutcomesResponse]:
        book = self._outcomes.book
        judged = book.judged()
        known = await asyncio.to_thread(self._seeker.known)
        drawn = outcomes.spot(book, self._me, nonce=secrets.token_bytes(16), here=known.__contains__)
        for record in book.records():
            judgement = judged.get(record.digest)
            pair = [known[digest].model.model_id for digest in record.value.pair if digest in known]
            yield pb.ListOutcomesResponse(
                author=record.author,
                at=record.at,
                digest=record.digest,
                outcome=record.value.to_bytes(),
                judged=judgement.value if judgement else "",
                models=pair if len(pair) == 2 else (),
                again=record in drawn,
            )

    async def RecordOutcome(self, request: pb.RecordOutcomeRequest, context: Any) -> pb.RecordOutcomeResponse:
        try:
            own = Outcome.parse(request.outcome)
        except CorruptCheckpoint as error:
            raise UsageError(error.why, hint="weft plan --help") from error
        await self._outcomes.say(outcomes.body(own))
        outcomes.settle(self._outcomes.book, own)
        return pb.RecordOutcomeResponse(digest=own.digest)


def _mini(data: bytes) -> Mini:
    try:
        return Mini.parse(data)
    except CorruptCheckpoint as error:
        raise UsageError(error.why, hint="weft partners --help") from error
