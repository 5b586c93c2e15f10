"""A search as a job of a node: what a peer holds is fetched for it, and an interruption costs no reading.

Two nodes in one process, everything real but libp2p.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource
from merge_core.evolution.genome import Shape
from merge_core.evolution.record import SearchRecord
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.structural.sketcher import compute
from node import app, daemon
from node.catalog.shelf import Measurable, Sketched
from node.config import Config
from node.control.server import Services
from node.domain.job import FOUND, Created, Job, JobKind, JobState
from node.domain.negotiation import Agreement, Purpose
from node.home import Home
from node.identity.envelopes import Envelope
from node.jobs.runner import JobView
from node.merging.evolve import Search
from node.network.memory import Fabric, MemoryNetwork

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(900)]
JOB = "search-1"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def sketch(measured: Measurable) -> Sketched:
    leaves = LeafTable.parse(Manifest.parse(measured.manifest.read_bytes()), measured.leaves.read_bytes())
    with Checkpoint.open(measured.directory) as checkpoint:
        structure = compute(VerifiedSource(checkpoint, leaves))
    made = Fingerprint(model_id=measured.model_id, structure=structure, behaviour=None)
    return Sketched(fingerprint=made.to_bytes())


@pytest.fixture
def desk(llamas: Callable[[Path], None], tmp_path: Path) -> Path:
    """Models that run, and what to be good at."""
    desk = tmp_path / "desk"
    llamas(desk)
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefgh") for _ in range(5)) for _ in range(40)]
    lines = (json.dumps({"prompt": f"{word}=", "answer": word[::-1]}) + "\n" for word in words)
    (desk / "words.jsonl").write_text("".join(lines))
    return desk


@asynccontextmanager
async def up(home: Home, fabric: Fabric) -> AsyncIterator[tuple[Services, MemoryNetwork]]:
    """A node of a home, made with its first start."""
    app.ensure_initialised(home)
    network = MemoryNetwork(fabric, app.identity(home).peer_id)
    settings = Config(network="test", peer_api="127.0.0.1:0", control_api="127.0.0.1:0")
    async with daemon.running_node(
        home, settings, app.identity(home), network, stop=lambda: None, clock=time.time
    ) as services:
        yield services, network


async def meet(bob: tuple[Services, MemoryNetwork], alice: tuple[Services, MemoryNetwork]) -> None:
    """Connect, and hear what there is."""
    await bob[1].connect(alice[1].addresses()[0])
    for _, envelope in alice[0].book.envelopes(time.time()):
        bob[0].book.admit(envelope, time.time())


def asked(desk: Path) -> Created:
    """A search with two models by their names in the catalogue, and one by where it lies."""
    models = [{"model": name, "parameters": {"weight": 1.0}} for name in ("math", str(desk / "code"))]
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    search = Search(tasks=(str(desk / "words.jsonl"),), shape=Shape(components=False), layers=0, budget=42)
    request = {
        "recipe": json.dumps(recipe),
        "directory": str(desk / "found"),
        "processes": 1,
        **search.to_json(),
    }
    return Created(kind=JobKind.EVOLVE, title="search for found", request=request)


def left(desk: Path) -> list[str]:
    return sorted(path.name for path in desk.glob(".*"))


def agreed(job: Job) -> list[Agreement]:
    return [Agreement.parse(Envelope.from_json(item).payload) for item in job.steps["agreements"]]


async def ended(node: Services) -> Job:
    return [view async for view in node.jobs.watch(JOB)][-1].job


async def test_a_search_that_its_node_interrupts_goes_on_at_the_next_start(
    desk: Path, tmp_path: Path
) -> None:
    fabric = Fabric()
    seen: list[JobView] = []
    journal, homes = (
        desk / ".found.weft-search" / "journal",
        [Home(tmp_path / who) for who in ("alice", "bob")],
    )
    async with AsyncExitStack() as stack:
        alice = await stack.enter_async_context(up(homes[0], fabric))
        for name in ("base", "math"):
            alice[0].shelf.add(
                desk / name,
                identity=alice[0].identity,
                sketch=sketch,
                now=time.time(),
                name=name,
                licence="MIT",
            )
        await alice[0].gossip.announce()

        async with up(homes[1], fabric) as bob:
            await meet(bob, alice)
            bob[0].jobs.start(JOB, asked(desk))
            async for view in bob[0].jobs.watch(JOB):
                seen.append(view)
                if view.generation is not None:
                    break
        before = journal.read_bytes()
        assert view.job.state is JobState.SEARCHING and view.job.can_settle
        assert {JobState.WAITING_FOR_PEERS, JobState.FETCHING} <= {view.job.state for view in seen}
        assert [len(row["weights"]) for row in view.generation["rows"]] == [3, 3]

        async with up(homes[1], fabric) as bob:
            await meet(bob, alice)
            job = await ended(bob[0])
            assert job.state is JobState.SUCCEEDED, job.error
            assert list(homes[1].parents.iterdir()) == []
    assert job.attempts == 2 and left(desk) == []
    record = SearchRecord.parse((desk / "found" / "weft.search.json").read_bytes())
    assert record.budget == 42 and before.count(b"\n") > 5
    assert job.result["search"]["generations"] == job.steps[FOUND]["generations"]

    # What came from Alice was agreed on twice: for the merge that the search began with, and for its result.
    assert [(item.purpose, item.plan) for item in agreed(job)] == [
        (Purpose.MERGE, job.steps["start"]),
        (Purpose.MERGE, job.steps["plan"]),
    ]
    report = app.verify(desk / "found", None)
    details = {check.name: check.detail for check in report.checks}
    assert report.ok and details["agreements"] == "1 signed by both sides, for 2 of 3 parents"
    assert "search" in details
