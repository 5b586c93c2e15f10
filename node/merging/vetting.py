"""Vetting: whether weights that came here are those that their advertised fingerprint was made of.

A fingerprint chooses merges before any weights move, so lying in it pays. Its structure follows from the
weights to the bit: when a model has come, and before it is kept or merged, a worker reads it once more, every
leaf hashed again, and computes the structure of just those bytes. If it is another one, the model goes, the
job ends, and what was found is signed and told to everybody (`node.provenance.fault`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from merge_core.checkpoint.published import MANIFEST_FILE
from merge_core.digest import Digest, ModelId
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.structural.structure import Structure, first_difference
from node.catalog import sketching
from node.catalog.shelf import Measurable
from node.domain.ids import PeerId
from node.errors import FalseFingerprint, KnownFalse, VerificationFailed
from node.exchange.fetch import Fetched
from node.provenance import fault
from node.provenance.fault import Fault
from node.provenance.fingerprint import SignedFingerprint
from node.records.book import Judgement, RecordBook

Measure = Callable[[Measurable], Awaitable[Structure]]
Say = Callable[[Any], Awaitable[None]]


async def measure_in_worker(measured: Measurable) -> Structure:
    """Compute the structure of a checkpoint, each leaf checked as it is read; never runs the model."""
    made = await sketching.sketch(measured, probes="")
    return Fingerprint.parse(made.fingerprint).structure


class Vetting:
    """What this node finds out about fingerprints, and whom it tells."""

    def __init__(
        self,
        faults: RecordBook[Fault],
        me: PeerId,
        *,
        say: Say,
        known: Callable[[Digest], bytes | None] = lambda digest: None,
        measure: Measure = measure_in_worker,
    ) -> None:
        """`known` has the signed fingerprints that came here before, by digest."""
        self._known = known
        self._faults = faults
        self._me = me
        self._say = say
        self._measure = measure

    def distrusted(self) -> frozenset[Digest]:
        """The fingerprints, by digest without signature, that this node itself has found to be false."""
        return frozenset(
            record.value.sworn.fingerprint for record in self._faults.records() if record.author == self._me
        )

    def expect_honest(self, signed: SignedFingerprint) -> None:
        """Raise KnownFalse where this node has found this fingerprint false before."""
        for record in self._faults.records():
            if record.author == self._me and record.value.sworn.fingerprint == signed.sworn.fingerprint:
                raise KnownFalse(_why(record.value, "found before"), publisher=_publisher(record.value))

    async def vet(
        self, signed: SignedFingerprint, fetched: Fetched, advertised: Iterable[Digest] = ()
    ) -> None:
        """Hold a fetched model against its fingerprint; raises FalseFingerprint, and tells everybody.

        So too with others that are `advertised` for this model and came here, as a plan may have been made by
        them: their authors are told of, and if the publisher is one of them, it is an error as well.
        """
        structure = await self._structure(fetched)
        publisher, lie = fetched.publisher, None
        for one in (signed, *self._others(signed, fetched, advertised)):
            found = fault.between(one, structure.digest)
            if found is not None:
                await self._say(found.to_json())
                if one is signed or one.author.publisher.key_id == publisher:
                    where = first_difference(one.fingerprint.structure, structure)
                    why = _why(found, f"first in {where}")
                    lie = lie or FalseFingerprint(why, publisher=_publisher(found))
        self._settle(fetched.manifest.model_id, structure)
        if lie is not None:
            raise lie

    def _others(
        self, signed: SignedFingerprint, fetched: Fetched, advertised: Iterable[Digest]
    ) -> list[SignedFingerprint]:
        """Other fingerprints of this model that came here; what else goes by such a digest is none."""
        found: dict[Digest, SignedFingerprint] = {}
        for digest in dict.fromkeys(advertised):
            data = self._known(digest)
            with suppress(VerificationFailed):
                if data is not None and (one := SignedFingerprint.parse(data)):
                    found[one.sworn.fingerprint] = one
        found.pop(signed.sworn.fingerprint, None)
        return [one for one in found.values() if one.sworn.model_id == fetched.manifest.model_id]

    def _settle(self, model_id: ModelId, structure: Structure) -> None:
        """Note of what was said about fingerprints of this model whether it is so."""
        for record in self._faults.records():
            if record.value.sworn.model_id == model_id:
                holds = structure.digest != record.value.sworn.structure
                self._faults.judge(record.digest, Judgement.HOLDS if holds else Judgement.REFUTED)

    async def _structure(self, fetched: Fetched) -> Structure:
        with TemporaryDirectory(prefix="weft-") as folder:
            leaves = Path(folder) / "leaves.bin"
            await asyncio.to_thread(leaves.write_bytes, fetched.leaves.to_bytes())
            return await self._measure(
                Measurable(
                    model_id=fetched.manifest.model_id,
                    directory=fetched.directory,
                    manifest=fetched.directory / MANIFEST_FILE,
                    leaves=leaves,
                )
            )


def _why(found: Fault, how: str) -> str:
    return (
        f"{found.sworn.model_id} is not what its fingerprint says ({how}): publisher"
        f" {_publisher(found)}, peer {found.sworn.author.peer_id}, signed a false one"
    )


def _publisher(found: Fault) -> str:
    return str(found.sworn.author.publisher.key_id)
