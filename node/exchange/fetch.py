"""Fetch an expert byte for byte as its publisher signed it, from holders who may lie, stall or die.

The order is: manifest, leaf table, signature, small files, headers, then what is already on this machine,
then leaves from all holders at once, then the SHA-256 of every file against the signature, then a rename.
A header can only be proved by that last step. If it was a lie, its sender is dropped and the layout changes,
but the bytes, which are proved leaf by leaf, are copied and not fetched again.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from merge_core.checkpoint.header import PREFIX, header_length
from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.published import PUBLISHER_FILE, SIGNATURE_FILE
from merge_core.digest import Digest, ModelId, sha256
from merge_core.errors import CorruptCheckpoint
from node.domain.holding import Holding, ModelRef
from node.domain.ids import PeerId
from node.errors import PeerError, VerificationFailed, WeftError
from node.exchange.blueprint import (
    MAX_SMALL_FILES,
    Blueprint,
    WeightFile,
    check_headers,
    is_weights,
    read_header,
    signed_files,
)
from node.exchange.holder import Holder, LocalContent, Progress
from node.exchange.local import LocalTensors, copy
from node.exchange.lookup import collect, first, nobody, read_leaf_table, read_manifest
from node.exchange.partial import Partial, Salvage, aside_of
from node.exchange.schedule import Patience, Schedule
from node.exchange.transfer import Transfer, to_the_end
from node.exchange.whole import is_whole
from node.provenance.oms import MAX_BUNDLE

THREADS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A whole expert on disk; `received` are verified bytes by peer, `copied` those found on this machine."""

    directory: Path
    manifest: Manifest
    leaves: LeafTable
    publisher: Digest
    received: Mapping[PeerId, int]
    copied: int
    dropped: Mapping[PeerId, WeftError]


@dataclass(slots=True, kw_only=True)
class _Tally:
    """What has come from where, and who is out."""

    received: dict[PeerId, int] = field(default_factory=dict)
    copied: int = 0
    dropped: dict[PeerId, WeftError] = field(default_factory=dict)

    def count(self, peer: PeerId, nbytes: int) -> None:
        self.received[peer] = self.received.get(peer, 0) + nbytes


async def fetch(
    model_id: ModelId,
    holders: Sequence[Holder],
    destination: Path,
    *,
    clock: Callable[[], float],
    publisher: Digest | None = None,
    have: LocalContent | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    patience: Patience | None = None,
) -> Fetched:
    """Fetch a model into the directory `destination`: it must not exist, be empty, or hold that very model.

    An interrupted fetch goes on where it was when it is called again; its traces lie beside the destination.
    One that had ended is verified again, and nothing is fetched.
    Raises NotEnoughPeers when nobody is left to ask, Refused when everybody refused; LocalError,
    LimitReached; CorruptCheckpoint when the publisher signed what is no checkpoint. `clock` is monotonic.
    """
    manifest = await read_manifest(holders, model_id)
    leaf_table = await read_leaf_table(holders, manifest)
    tally = _Tally()
    aside: dict[str, Salvage] = {}
    try:
        with ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="leaf") as pool:
            while True:
                blueprint, author = await _draw(holders, manifest, leaf_table, publisher, tally)
                job = _Job(
                    blueprint=blueprint,
                    holders=[holder for holder in holders if holder.peer not in tally.dropped],
                    tally=tally,
                    local=LocalTensors(aside, have),
                    pool=pool,
                    clock=clock,
                    patience=patience,
                    on_progress=on_progress,
                )
                lies = await job.run(destination)
                if lies is None:
                    break
                aside = lies
                tally.dropped[author] = PeerError(f"peer {author.short} sent a header that was not signed")
    finally:
        shutil.rmtree(aside_of(destination), ignore_errors=True)
    return Fetched(
        directory=destination,
        manifest=manifest,
        leaves=leaf_table,
        publisher=blueprint.publisher,
        received=dict(tally.received),
        copied=tally.copied,
        dropped=dict(tally.dropped),
    )


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One layout being filled."""

    blueprint: Blueprint
    holders: Sequence[Holder]
    tally: _Tally
    local: LocalTensors
    pool: Executor
    clock: Callable[[], float]
    patience: Patience | None
    on_progress: Callable[[Progress], None] | None

    async def run(self, destination: Path) -> dict[str, Salvage] | None:
        """Fill the layout and put it into place.

        Returns None, or, if a header turned out a lie, where the tensors' bytes lie now by content root.
        """
        if await to_the_end(self.pool, is_whole, destination, self.blueprint):
            return None
        partial = await _open(destination, self.blueprint)
        try:
            await self._copy(partial)
            await self._fetch(partial)
            if await to_the_end(self.pool, partial.changed_files):
                return await to_the_end(self.pool, partial.set_aside)
            await to_the_end(self.pool, partial.commit)
        finally:
            await to_the_end(self.pool, partial.close)
        return None

    async def _copy(self, partial: Partial) -> None:
        for leaves in self.blueprint.by_tensor().values():
            wanted = [leaf for leaf in leaves if leaf.number not in partial.verified]
            if wanted:
                place = await to_the_end(self.pool, self.local.find, leaves)
                if place:
                    self.tally.copied += await to_the_end(self.pool, copy, partial, wanted, place)

    async def _fetch(self, partial: Partial) -> None:
        leaves = self.blueprint.leaves
        missing = [leaf.number for leaf in leaves if leaf.number not in partial.verified]
        schedule = Schedule(missing, [holder.peer for holder in self.holders], patience=self.patience)
        total = sum(leaf.size for leaf in leaves)
        done = total - sum(leaves[number].size for number in missing)

        def report(peer: PeerId | None, nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if peer:
                self.tally.count(peer, nbytes)
            if self.on_progress:
                self.on_progress(Progress(total=total, done=done, received=dict(self.tally.received)))

        report(None, 0)
        ref = ModelRef(model_id=self.blueprint.manifest.model_id, publisher=None)
        transfer = Transfer(
            ref=ref,
            leaves=leaves,
            partial=partial,
            schedule=schedule,
            clock=self.clock,
            pool=self.pool,
            on_leaf=report,
        )
        self.tally.dropped.update(await transfer.run(self.holders))
        if not schedule.done:
            raise nobody(f"the rest of {ref.model_id}", self.tally.dropped)


async def _open(destination: Path, blueprint: Blueprint) -> Partial:
    opening = asyncio.ensure_future(asyncio.to_thread(Partial.open, destination, blueprint))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        await asyncio.wait([opening])
        if not opening.exception():
            opening.result().close()
        raise


async def _draw(
    holders: Sequence[Holder],
    manifest: Manifest,
    leaf_table: LeafTable,
    publisher: Digest | None,
    tally: _Tally,
) -> tuple[Blueprint, PeerId]:
    """Get signature, small files and headers from the first holder whose answers hold together.

    A holder that was caught sending anything else is dropped from the whole fetch.
    """
    asked = [holder for holder in holders if holder.peer not in tally.dropped]
    if not asked:
        raise nobody(f"an honest copy of {manifest.model_id}", tally.dropped)

    async def ask(holder: Holder) -> tuple[Blueprint, PeerId]:
        ref = ModelRef(model_id=manifest.model_id, publisher=publisher)
        holding = await holder.describe(ref)
        if publisher not in (None, holding.publisher):
            raise PeerError(f"peer {holder.peer.short} answered for another publisher")
        ref = ModelRef(model_id=manifest.model_id, publisher=holding.publisher)
        small, signed = await _small_files(holder, ref, holding, manifest)
        weights = []
        for path in sorted(filter(is_weights, signed)):
            size = _size(holding, path)
            data = await _header_bytes(holder, ref, path, size)
            weights.append(WeightFile(path=path, size=size, sha256=signed[path], header=data))
        check_headers(
            manifest, {file.path: read_header(file.path, file.header, file.size) for file in weights}
        )
        for data in (*small.values(), *(file.header for file in weights)):
            tally.count(holder.peer, len(data))
        blueprint = Blueprint(
            manifest=manifest,
            leaf_table=leaf_table,
            publisher=holding.publisher,
            small=small,
            weights=tuple(weights),
        )
        return blueprint, holder.peer

    failures: dict[PeerId, WeftError] = {}
    drawn = await first(asked, ask, f"the files of {manifest.model_id}", failures)
    liars = {peer: e for peer, e in failures.items() if isinstance(e, PeerError | VerificationFailed)}
    tally.dropped.update(liars)
    return drawn


async def _small_files(
    holder: Holder, ref: ModelRef, holding: Holding, manifest: Manifest
) -> tuple[dict[str, bytes], Mapping[str, Digest]]:
    """Every file but the weights, each held against the signed digest; and all signed digests."""
    bundle = await _file(holder, ref, holding, SIGNATURE_FILE, limit=MAX_BUNDLE)
    record = await _file(holder, ref, holding, PUBLISHER_FILE)
    signed = signed_files(manifest, bundle, record, holding.publisher)
    small = {SIGNATURE_FILE: bundle, PUBLISHER_FILE: record}
    left = MAX_SMALL_FILES
    for path in sorted(set(signed) - {PUBLISHER_FILE}):
        if is_weights(path):
            continue
        data = await _file(holder, ref, holding, path, limit=left)
        if sha256(data) != signed[path]:
            raise PeerError(f"peer {holder.peer.short} sent another {path} than the signed one")
        small[path] = data
        left -= len(data)
    return small, signed


async def _file(
    holder: Holder, ref: ModelRef, holding: Holding, path: str, *, limit: int = MAX_SMALL_FILES
) -> bytes:
    size = _size(holding, path)
    if size > limit:
        raise PeerError(f"{path} has {size} bytes; at most {limit} are read")
    return await collect(holder.file(ref, path, 0, size), size)


async def _header_bytes(holder: Holder, ref: ModelRef, path: str, size: int) -> bytes:
    try:
        prefix = await collect(holder.file(ref, path, 0, min(PREFIX, size)), PREFIX)
        length = header_length(prefix, size)
    except CorruptCheckpoint as error:
        raise PeerError(f"{path}: {error.why}") from error
    return prefix + await collect(holder.file(ref, path, PREFIX, length - PREFIX), length - PREFIX)


def _size(holding: Holding, path: str) -> int:
    size = holding.size_of(path)
    if size is None:
        raise VerificationFailed(f"the peer does not have {path}, which belongs to the model")
    return size
