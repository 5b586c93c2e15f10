"""What can be had of a model before any agreement: manifest, leaf table, config, tokens, fingerprint, plan.

Each but the plan proves itself against a digest, so the first holder whose answer holds is as good as any.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from merge_core.checkpoint.manifest import MAX_MANIFEST, LeafTable, Manifest
from merge_core.checkpoint.published import PLAN_FILE
from merge_core.digest import Digest, ModelId, sha256
from merge_core.errors import CorruptCheckpoint
from merge_core.plan import MAX_PLAN, MergePlan
from merge_core.tokenizer.vocabulary import TOKENIZER_FILES
from node.domain.holding import ModelRef
from node.domain.ids import PeerId
from node.errors import NotEnoughPeers, PeerError, Refused, Unreachable, VerificationFailed, WeftError
from node.exchange.holder import Holder
from node.provenance.fingerprint import MAX_SIGNED, SignedFingerprint

PIECE_DEADLINE = 15.0
"""Seconds to wait for the next piece of something small."""
MAX_CONFIG = 1 << 20
MAX_TOKENIZER = 64 << 20

T = TypeVar("T")


async def read_manifest(holders: Sequence[Holder], model_id: ModelId) -> Manifest:
    """Ask holders in turn for a manifest; raises Refused or NotEnoughPeers when none has it."""
    ref = ModelRef(model_id=model_id, publisher=None)

    async def ask(holder: Holder) -> Manifest:
        data = await collect(holder.manifest(ref), MAX_MANIFEST)
        if sha256(data) != model_id:
            raise PeerError(f"peer {holder.peer.short} sent another model's manifest")
        # Somebody made these bytes to be slow: only this one fetch waits for them, in a thread.
        return await asyncio.to_thread(Manifest.parse, data)

    return await first(holders, ask, f"the manifest of {model_id}")


async def read_leaf_table(holders: Sequence[Holder], manifest: Manifest) -> LeafTable:
    """Ask holders in turn for the leaf table of a manifest; raises as `read_manifest` does.

    Raises CorruptCheckpoint, and asks nobody, when the manifest names more than MAX_LEAF_TABLE bytes of it.
    """
    ref = ModelRef(model_id=manifest.model_id, publisher=None)
    size = LeafTable.size(manifest)

    async def ask(holder: Holder) -> LeafTable:
        data = await collect(holder.leaf_table(ref), size)
        return await asyncio.to_thread(LeafTable.parse, manifest, data)

    return await first(holders, ask, f"the leaf table of {manifest.model_id}")


async def read_config(holders: Sequence[Holder], manifest: Manifest) -> dict[str, Any]:
    """Ask holders in turn for the model's config.json; raises as `read_manifest` does."""
    ref = ModelRef(model_id=manifest.model_id, publisher=None)
    record = next((file for file in manifest.files if file.path == "config.json"), None)
    if record is None or record.size > MAX_CONFIG:
        raise CorruptCheckpoint(f"{manifest.model_id} has no readable config.json")

    async def ask(holder: Holder) -> dict[str, Any]:
        data = await collect(holder.file(ref, record.path, 0, record.size), record.size)
        if sha256(data) != record.sha256:
            raise PeerError(f"peer {holder.peer.short} sent another config.json")
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CorruptCheckpoint(f"config.json of {manifest.model_id} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise CorruptCheckpoint(f"config.json of {manifest.model_id} is not an object")
        return value

    return await first(holders, ask, f"the config of {manifest.model_id}")


async def read_tokenizer(holders: Sequence[Holder], manifest: Manifest) -> dict[str, bytes]:
    """Ask holders in turn for the files that say which tokens a model has; raises as `read_manifest` does."""
    ref = ModelRef(model_id=manifest.model_id, publisher=None)
    wanted = [file for file in manifest.files if file.path in TOKENIZER_FILES]
    if sum(file.size for file in wanted) > MAX_TOKENIZER:
        raise CorruptCheckpoint(
            f"the tokenizer of {manifest.model_id} has more than {MAX_TOKENIZER} bytes",
            hint=f"weft get {manifest.model_id}, then merge the directory",
        )

    async def ask(holder: Holder) -> dict[str, bytes]:
        files = {}
        for file in wanted:
            data = await collect(holder.file(ref, file.path, 0, file.size), file.size)
            if sha256(data) != file.sha256:
                raise PeerError(f"peer {holder.peer.short} sent another {file.path}")
            files[file.path] = data
        return files

    return await first(holders, ask, f"the tokenizer of {manifest.model_id}")


async def read_plan(holders: Sequence[Holder], model_id: ModelId) -> MergePlan:
    """Ask holders in turn by which plan a model was merged; raises as `read_manifest` does.

    It is what the holder says: only the signature, which comes with the model, proves it.
    """
    anybody = ModelRef(model_id=model_id, publisher=None)

    async def ask(holder: Holder) -> MergePlan:
        holding = await holder.describe(anybody)
        size = holding.size_of(PLAN_FILE)
        if size is None or size > MAX_PLAN:
            raise PeerError(f"{model_id} is not a merge, says peer {holder.peer.short}")
        ref = ModelRef(model_id=model_id, publisher=holding.publisher)
        data = await collect(holder.file(ref, PLAN_FILE, 0, size), size)
        return await asyncio.to_thread(MergePlan.parse, data)

    return await first(holders, ask, f"the plan of {model_id}")


async def read_fingerprint(holders: Sequence[Holder], model_id: ModelId, digest: Digest) -> bytes:
    """Ask holders in turn for the fingerprint that an advert names; raises as `read_manifest` does."""

    async def ask(holder: Holder) -> bytes:
        data = await collect(holder.fingerprint(digest), MAX_SIGNED)
        if sha256(data) != digest:
            raise PeerError(f"peer {holder.peer.short} sent another fingerprint than its advert names")
        if SignedFingerprint.parse(data).fingerprint.model_id != model_id:
            raise PeerError(f"peer {holder.peer.short} advertises another model's fingerprint")
        return data

    return await first(holders, ask, f"the fingerprint of {model_id}")


async def first(
    holders: Sequence[Holder],
    ask: Callable[[Holder], Awaitable[T]],
    what: str,
    failures: dict[PeerId, WeftError] | None = None,
) -> T:
    """Return the first answer that holds, asking one holder after the other; note in `failures` who failed.

    Raises Refused when everybody refused, else NotEnoughPeers.
    """
    failures = {} if failures is None else failures
    for holder in holders:
        try:
            return await ask(holder)
        except (PeerError, Refused, Unreachable, VerificationFailed) as error:
            failures[holder.peer] = error
        except CorruptCheckpoint as error:
            failures[holder.peer] = PeerError(error.why)
    raise nobody(what, failures)


async def collect(
    stream: AsyncGenerator[bytes, None], limit: int, *, deadline: float = PIECE_DEADLINE
) -> bytes:
    """Read a stream to its end; raises PeerError above `limit` bytes, Unreachable when a piece is late."""
    data = bytearray()
    try:
        async with aclosing(stream) as pieces:
            while True:
                async with asyncio.timeout(deadline):
                    piece = await anext(pieces, None)
                if piece is None:
                    return bytes(data)
                data += piece
                if len(data) > limit:
                    raise PeerError(f"more than the {limit} bytes that belong")
    except TimeoutError as error:
        raise Unreachable(f"nothing came for {deadline:.0f} s") from error


def nobody(what: str, failures: dict[PeerId, WeftError]) -> WeftError:
    """The error to end with when every holder failed; `failures` says how each did."""
    if failures and all(isinstance(error, Refused) for error in failures.values()):
        return next(iter(failures.values()))
    told = "; ".join(f"{peer.short}: {error.why}" for peer, error in failures.items())
    return NotEnoughPeers(f"nobody gave us {what}" + (f" ({told})" if told else ""), hint="weft peers")
