"""What comes here from peers, and for whom: two nodes in one process, everything real but libp2p."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource
from merge_core.digest import Digest, ModelId
from merge_core.errors import CorruptCheckpoint, InvalidRecipe
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.structural.sketcher import compute
from node import app, daemon
from node.catalog.book import Outcome
from node.catalog.expert import FINGERPRINT
from node.catalog.shelf import Measurable, Shelf, Sketched
from node.config import Config
from node.control.server import Services
from node.domain.advert import PAYLOAD_TYPE, Advert
from node.domain.job import Created, Ended, Job, JobKind, JobState
from node.domain.negotiation import Agreement, Purpose
from node.errors import LocalError, Unreachable, VerificationFailed
from node.home import Home
from node.identity.envelopes import Envelope, seal
from node.identity.keys import HostKey
from node.jobs.journal import Journal
from node.jobs.runner import Attempt
from node.merging.canvass import Pace
from node.merging.private import KEEP_SECONDS, PrivateShelves, is_over
from node.merging.references import LocalDirectory, Named, parse_reference
from node.merging.remote import NetworkParents
from node.merging.work import Tidy
from node.network.memory import Fabric, MemoryNetwork
from node.store import Store

pytestmark = pytest.mark.anyio
PLAN, OTHER = (Digest("sha256:" + digit * 64) for digit in "12")
SMALL = 64 << 10


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def sketch(measured: Measurable) -> Sketched:
    leaves = LeafTable.parse(Manifest.parse(measured.manifest.read_bytes()), measured.leaves.read_bytes())
    with Checkpoint.open(measured.directory) as checkpoint:
        structure = compute(VerifiedSource(checkpoint, leaves))
    made = Fingerprint(model_id=measured.model_id, structure=structure, behaviour=None)
    return Sketched(fingerprint=made.to_bytes())


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Alice, who holds one model, and Bob, who wants it."""

    model: ModelId
    size: int
    alice: Services
    bob: Services
    alice_network: MemoryNetwork

    async def get(self, job_id: str) -> Job:
        """A job of Bob's that fetches the model, at its end."""
        request = {"model_id": self.model, "publisher": ""}
        self.bob.jobs.start(job_id, Created(kind=JobKind.FETCH, title="get", request=request))
        return await self.end(job_id)

    async def end(self, job_id: str) -> Job:
        async for view in self.bob.jobs.watch(job_id):
            last = view.job
        return last

    def incoming(self) -> list[str]:
        folder = self.bob.home.incoming
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def received(job: Job) -> int:
    account: Mapping[str, Any] = job.steps.get("received") or {}
    return int(sum(count for count, _ in account.values()))


def agreements(job: Job) -> list[Agreement]:
    return [Agreement.parse(Envelope.from_json(item).payload) for item in job.steps.get("agreements", [])]


@pytest.fixture
async def pair(tmp_path: Path, model_dir: Path) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        fabric = Fabric()

        async def up(name: str, share: bool) -> tuple[Services, MemoryNetwork]:
            home = Home(tmp_path / name)
            identity = app.initialise(home, now=time.time())
            if share:
                Shelf(home.experts).add(
                    model_dir, identity=identity, sketch=sketch, now=time.time(), name="math", licence="MIT"
                )
            network = MemoryNetwork(fabric, identity.peer_id)
            settings = Config(network="test", peer_api="127.0.0.1:0", control_api="127.0.0.1:0")
            services = await stack.enter_async_context(
                daemon.running_node(home, settings, identity, network, stop=lambda: None, clock=time.time)
            )
            return services, network

        alice, alice_network = await up("alice", True)
        bob, network = await up("bob", False)
        await network.connect(alice_network.addresses()[0])
        for _, envelope in alice.book.envelopes(time.time()):
            bob.book.admit(envelope, time.time())
        (model,) = {listing.model for listing in bob.book.listings(time.time())}
        yield Pair(model=model.model_id, size=model.size, alice=alice, bob=bob, alice_network=alice_network)


def attempt(pair: Pair, journal: Journal, job_id: str) -> Attempt:
    """Bob's next attempt at a job."""
    try:
        job = journal.load(job_id)
    except LocalError:
        created = Created(kind=JobKind.MERGE, title="merge", request={})
        job = journal.create(job_id, created, time.time())
    return Attempt(journal, job, time.time, lambda view: None)


def parents_of(services: Services) -> NetworkParents:
    source = services.merging._parents
    assert isinstance(source, NetworkParents)
    return source


def plan(digest: Digest) -> Any:
    return SimpleNamespace(digest=digest)


async def test_a_model_that_arrived_and_was_not_shelved_is_not_fetched_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LocalError("no room")

    with monkeypatch.context() as broken:
        broken.setattr(Shelf, "adopt", fail)
        first = await pair.get("first-job")
    assert first.state is JobState.FAILED and received(first) >= pair.size
    (whole,) = (pair.bob.home.incoming / "first-job").iterdir()
    assert (whole / "model.safetensors").is_file()

    # As a kill between the rename and the end of the fetch leaves it.
    shell = whole.with_name(f".{whole.name}.partial")
    (shell / "files").mkdir(parents=True)
    pair.bob.jobs.resume("first-job")
    second = await pair.end("first-job")
    assert second.state is JobState.SUCCEEDED
    assert received(second) - received(first) < SMALL
    assert pair.incoming() == [] and pair.bob.shelf.find(pair.model) is not None


async def test_what_lies_where_a_model_belongs_is_verified_before_it_is_taken(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LocalError("no room")

    with monkeypatch.context() as broken:
        broken.setattr(Shelf, "adopt", fail)
        await pair.get("first-job")
    (whole,) = (pair.bob.home.incoming / "first-job").iterdir()
    weights = whole / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    pair.bob.jobs.resume("first-job")
    ended = await pair.end("first-job")
    assert ended.state is JobState.FAILED and ended.error is not None
    assert str(whole) in ended.error["why"] and pair.bob.shelf.find(pair.model) is None


async def test_without_the_fingerprint_nothing_heavy_is_fetched(pair: Pair) -> None:
    (folder,) = pair.alice.home.experts.glob("*/*")
    there = (folder / FINGERPRINT).read_bytes()
    (folder / FINGERPRINT).write_bytes(b"{}")
    for held in pair.alice.shelf._held.values():
        held.__dict__.pop("fingerprint", None)
    job = await pair.get("first-job")
    assert job.state is JobState.FAILED and job.error is not None and "fingerprint" in job.error["why"]
    assert received(job) == 0 and pair.incoming() == []
    (folder / FINGERPRINT).write_bytes(there)
    for held in pair.alice.shelf._held.values():
        held.__dict__.pop("fingerprint", None)
    pair.bob.jobs.resume("first-job")
    assert (await pair.end("first-job")).state is JobState.SUCCEEDED


async def test_two_jobs_for_one_model_fetch_it_once(pair: Pair) -> None:
    jobs = await asyncio.gather(pair.get("first-job"), pair.get("second-job"))
    assert [job.state for job in jobs] == [JobState.SUCCEEDED, JobState.SUCCEEDED]
    assert sorted(received(job) > SMALL for job in jobs) == [False, True]
    assert pair.incoming() == []


async def test_a_crowd_of_adverts_that_lead_nowhere_does_not_keep_a_job_from_the_one_holder(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model,) = {listing.model for listing in pair.bob.book.listings(time.time())}
    for number in range(100):
        key = HostKey.generate()
        advert = Advert(
            network="test",
            peer=key.peer_id,
            seq=1,
            issued_at=int(time.time()),
            expires_at=int(time.time()) + 600,
            previous=None,
            models=(model,),
            addresses=(f"/ip4/192.0.2.{number}/tcp/4001/p2p/{key.peer_id}",),
        )
        admission = pair.bob.book.admit(seal(PAYLOAD_TYPE, advert.to_bytes(), key).to_bytes(), time.time())
        assert admission.outcome is Outcome.NEW
    dialled: list[str] = []

    async def swallow(address: str, *, deadline: float) -> None:
        dialled.append(address)
        await asyncio.Event().wait()

    monkeypatch.setattr(pair.bob.network, "connect", swallow)
    pace = Pace(at_once=16, turn=0.3, grace=0.05, total=30.0)
    object.__setattr__(parents_of(pair.bob)._overlay, "pace", pace)
    async with asyncio.timeout(20):
        job = await pair.get("first-job")
    assert job.state is JobState.SUCCEEDED and dialled
    assert {agreement.provider for agreement in agreements(job)} == {pair.alice.identity.peer_id}


def advertise(pair: Pair, seed: int, **changes: Any) -> None:
    """Let a stranger advertise Alice's model under terms of its own, from a place where nobody answers."""
    (model,) = {x.model for x in pair.bob.book.listings(time.time()) if x.peer == pair.alice.identity.peer_id}
    key = HostKey.from_private_bytes(bytes([seed]) * 32)
    advert = Advert(
        network="test",
        peer=key.peer_id,
        seq=1,
        issued_at=int(time.time()),
        expires_at=int(time.time()) + 600,
        previous=None,
        models=(replace(model, **changes),),
        addresses=pair.alice_network.addresses(),
    )
    sealed = seal(PAYLOAD_TYPE, advert.to_bytes(), key).to_bytes()
    assert pair.bob.book.admit(sealed, time.time()).outcome is Outcome.NEW


async def test_nobody_renames_or_relicenses_what_somebody_else_published(pair: Pair) -> None:
    advertise(pair, 7, name="!", licence="CC0-1.0")
    advertise(pair, 8, name="!!", licence="CC0-1.0", publisher=PLAN)
    advertise(pair, 9, name="!!!", fingerprint=OTHER)
    job = await pair.get("first-job")
    assert job.state is JobState.SUCCEEDED, job.error
    (expert,) = pair.bob.shelf.experts()
    assert (expert.name, expert.licence) == ("math", "MIT")
    assert expert.publisher == pair.alice.identity.publisher.key_id


async def test_what_one_merge_was_granted_another_has_to_ask_for_but_not_to_fetch(
    pair: Pair, tmp_path: Path
) -> None:
    journal, source = Journal(Store(tmp_path / "jobs.db")), parents_of(pair.bob)
    one, two = attempt(pair, journal, "merge-one"), attempt(pair, journal, "merge-two")
    found = await source.find([pair.model], one)
    first = await source.obtain(found, plan(PLAN), Purpose.MERGE, one)
    assert first.parents[pair.model].directory.is_relative_to(pair.bob.home.parents / "merge-one")
    assert received(one.job) >= pair.size

    again = await source.find(["math"], two)
    assert again[0].directory is None and again[0].holders == (pair.alice.identity.peer_id,)
    second = await source.obtain(again, plan(OTHER), Purpose.MERGE, two)
    assert [(item.purpose, item.plan) for item in agreements(two.job)] == [(Purpose.MERGE, OTHER)]
    assert received(two.job) < SMALL
    assert second.parents[pair.model].directory.is_relative_to(pair.bob.home.parents / "merge-two")
    assert pair.bob.shelf.experts() == ()


async def test_what_a_job_has_for_one_plan_is_agreed_on_for_its_next_and_not_fetched(
    pair: Pair, tmp_path: Path
) -> None:
    journal, source = Journal(Store(tmp_path / "jobs.db")), parents_of(pair.bob)
    job = attempt(pair, journal, "search")
    first = await source.obtain(await source.find([pair.model], job), plan(PLAN), Purpose.MERGE, job)
    before = received(job.job)
    second = await source.obtain(await source.find([pair.model], job), plan(OTHER), Purpose.MERGE, job)
    assert received(job.job) == before and second.parents == first.parents
    told = [[Agreement.parse(e.payload).plan for e in each.agreements] for each in (first, second)]
    assert told == [[PLAN], [OTHER]] and len(agreements(job.job)) == 2
    resumed = attempt(pair, journal, "search")
    again = await source.obtain(await source.find([pair.model], resumed), plan(OTHER), Purpose.MERGE, resumed)
    assert again.agreements == second.agreements and len(agreements(resumed.job)) == 2


async def test_a_resumed_merge_needs_nobody_for_what_it_has(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, source = Journal(Store(tmp_path / "jobs.db")), parents_of(pair.bob)
    one = attempt(pair, journal, "merge-one")
    before = await source.obtain(await source.find([pair.model], one), plan(PLAN), Purpose.MERGE, one)
    await pair.alice_network.stop()

    async def gone(peer: str) -> None:
        raise Unreachable(f"{peer} is gone")

    monkeypatch.setattr(source._overlay.links, "to", gone)
    resumed = attempt(pair, journal, "merge-one")
    found = await source.find([pair.model], resumed)
    after = await source.obtain(found, plan(PLAN), Purpose.MERGE, resumed)
    assert (after.parents, after.agreements) == (before.parents, before.agreements)
    assert found[0].licence == "MIT"
    two = attempt(pair, journal, "merge-two")
    with pytest.raises(LocalError, match="is gone"):
        await source.find([pair.model], two)


def folders(root: Path, *jobs: str) -> tuple[PrivateShelves, Callable[[], set[str]]]:
    """Private shelves with something of each job in both places."""
    for job in jobs:
        for place in ("parents", "incoming"):
            (root / place / job / "some").mkdir(parents=True)
    private = PrivateShelves(root / "parents", root / "incoming")
    return private, lambda: {path.name for path in root.glob("*/*")}


async def test_what_a_job_fetched_for_itself_goes_with_it_unless_it_may_be_resumed(tmp_path: Path) -> None:
    private, left = folders(tmp_path, "mine", "theirs")
    one: Any = SimpleNamespace(job=SimpleNamespace(id="mine"))

    def work(error: Exception | None) -> Tidy:
        async def run(attempt: Attempt) -> dict[str, Any]:
            if error is not None:
                raise error
            return {"done": True}

        return Tidy(run, private)

    passing: list[BaseException] = [Unreachable("gone"), LocalError("full"), asyncio.CancelledError()]
    for error in passing:
        with pytest.raises(type(error)):
            await work(error)(one)  # type: ignore[arg-type]
        assert left() == {"mine", "theirs"}
    for final in (CorruptCheckpoint("bad"), VerificationFailed("a lie")):
        with pytest.raises(type(final)):
            await work(final)(one)
        assert left() == {"theirs"}
        folders(tmp_path, "mine")
    assert await work(None)(one) == {"done": True}
    assert left() == {"theirs"}


def test_what_jobs_left_is_swept_when_nobody_can_want_it_any_more(tmp_path: Path) -> None:
    private, left = folders(tmp_path, "runs", "won", "failed", "stopped", "unknown")
    journal = Journal(Store(tmp_path / "jobs.db"))
    for job in ("runs", "won", "failed", "stopped"):
        journal.create(job, Created(kind=JobKind.MERGE, title=job, request={}), 0.0)
    journal.append("won", Ended(state=JobState.SUCCEEDED, result={}), 0.0)
    journal.append("failed", Ended(state=JobState.FAILED, error={}), 0.0)
    journal.append("stopped", Ended(state=JobState.CANCELLED), 100.0)
    left_of = left() & {"runs", "won", "failed", "stopped", "unknown"}
    assert len(left_of) == 5
    private.sweep(lambda job: is_over(journal, job, KEEP_SECONDS - 1))
    assert left() & left_of == {"runs", "failed", "stopped"}
    private.sweep(lambda job: is_over(journal, job, KEEP_SECONDS + 50))
    assert left() & left_of == {"runs", "stopped"}


def test_a_name_means_the_same_wherever_the_node_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "math").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_reference("math", tmp_path) == LocalDirectory(tmp_path / "math")
    assert parse_reference("math", None) == Named("math")
    assert parse_reference(str(tmp_path / "math"), None) == LocalDirectory(tmp_path / "math")
    with pytest.raises(InvalidRecipe, match="relative to nothing"):
        parse_reference("./math", None)
