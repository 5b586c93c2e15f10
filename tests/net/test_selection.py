"""Choosing by fingerprints: two nodes in one process, everything real but libp2p."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from merge_core import recipe as recipes
from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource, measure
from merge_core.digest import ModelId, sha256
from merge_core.errors import InvalidRecipe
from merge_core.simmerge.choosing.outcomes import Outcome as Measured
from merge_core.simmerge.choosing.predictor import Layer, Predictor
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.index import Index
from merge_core.simmerge.mini import Mini
from merge_core.simmerge.structural.sketcher import compute
from node import app, daemon
from node.catalog.book import Outcome
from node.catalog.fingerprint_cache import FingerprintCache
from node.catalog.shelf import Measurable, Shelf, Sketched
from node.cli import main
from node.config import Config
from node.control import running
from node.control.client import ControlClient
from node.control.server import Services
from node.domain.advert import PAYLOAD_TYPE, Advert
from node.domain.job import Created, JobKind, JobState
from node.errors import NotEnoughPeers
from node.home import Home
from node.identity.envelopes import seal
from node.identity.keys import HostKey
from node.network.memory import Fabric, MemoryNetwork
from node.provenance.fault import Standing, accusations
from node.selection import auto, outcomes
from node.selection.candidate import Candidate

pytestmark = pytest.mark.anyio
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16}
SHAPES = {
    "model.embed_tokens.weight": (64, 16),
    "model.layers.0.mlp.up_proj.weight": (40, 16),
    "model.norm.weight": (16,),
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def write(directory: Path, *seeds: int) -> Path:
    """A base and, for each further seed, a step away from it."""
    directory.mkdir(parents=True)
    draws = [np.random.default_rng(seed) for seed in seeds]
    tensors = {
        name: sum(
            (0.1 if step else 1.0) * draw.standard_normal(shape) for step, draw in enumerate(draws)
        ).astype(np.float32)  # type: ignore[union-attr]
        for name, shape in SHAPES.items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "README.md").write_text("---\nlicense: mit\n---\n")
    return directory


def sketch(measured: Measurable) -> Sketched:
    leaves = LeafTable.parse(Manifest.parse(measured.manifest.read_bytes()), measured.leaves.read_bytes())
    with Checkpoint.open(measured.directory) as checkpoint:
        structure = compute(VerifiedSource(checkpoint, leaves))
    made = Fingerprint(model_id=measured.model_id, structure=structure, behaviour=None)
    return Sketched(fingerprint=made.to_bytes())


def lying(about: Path) -> Callable[[Measurable], Sketched]:
    """Computes the structure of other weights than it is asked for."""

    def lie(measured: Measurable) -> Sketched:
        with Checkpoint.open(about) as checkpoint:
            leaves = {name: [] for name in checkpoint.tensors}
            structure = compute(_Unchecked(checkpoint, leaves))  # type: ignore[arg-type]
        made = Fingerprint(model_id=measured.model_id, structure=structure, behaviour=None)
        return Sketched(fingerprint=made.to_bytes())

    return lie


class _Unchecked:
    """A checkpoint's tensors as they are."""

    def __init__(self, checkpoint: Checkpoint, leaves: Any) -> None:
        self.tensors = checkpoint.tensors
        self._checkpoint = checkpoint

    def read(self, name: str, offset: int, length: int) -> bytes:
        return bytes(self._checkpoint.read_bytes(name, offset, length))


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Alice shares a base, two experts of it and one whose fingerprint lies; Bob asks."""

    alice: Services
    bob: Services
    models: Path
    ids: dict[str, str]


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        fabric, models = Fabric(), tmp_path / "models"
        write(models / "base", 1)
        for seed, name in enumerate(("math", "code", "false"), 2):
            write(models / name, 1, seed)

        async def up(name: str, *shared: str) -> tuple[Services, MemoryNetwork]:
            home = Home(tmp_path / name)
            identity = app.initialise(home, now=time.time())
            shelf = Shelf(home.experts)
            base = None
            for each in shared:
                how = lying(models / "math") if each == "false" else sketch
                added = shelf.add(models / each, identity=identity, sketch=how, now=time.time(), base=base)
                base = base or added.expert.model_id
            network = MemoryNetwork(fabric, identity.peer_id)
            settings = Config(network="test", peer_api="127.0.0.1:0", control_api="127.0.0.1:0")
            stack.enter_context(running.alone(home))
            services = await stack.enter_async_context(
                daemon.running_node(home, settings, identity, network, stop=lambda: None, clock=time.time)
            )
            return services, network

        alice, alice_network = await up("alice", "base", "math", "code", "false")
        bob, network = await up("bob")
        await network.connect(alice_network.addresses()[0])
        await until(lambda: len(bob.book.listings(time.time())) == 4)
        ids = {x.model.name: str(x.model.model_id) for x in bob.book.listings(time.time())}
        yield Pair(alice=alice, bob=bob, models=models, ids=ids)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.to_thread(lambda: None)


async def test_an_expert_is_found_by_name_or_id_once_and_no_weights_move(pair: Pair) -> None:
    found = await pair.bob.seeker.find("math")
    assert str(found.model_id) == found.reference == pair.ids["math"]
    assert str(found.base) == pair.ids["base"] and 0 < found.moved < 300_000
    assert found.author == pair.alice.identity.publisher.key_id
    for reference in (pair.ids["math"], f"peer://{pair.alice.identity.peer_id}/{pair.ids['math']}"):
        again = await pair.bob.seeker.find(reference)
        assert again.moved == 0 and again.model_id == found.model_id
    with pytest.raises(NotEnoughPeers, match="nobody advertises"):
        await pair.bob.seeker.find("law")
    with pytest.raises(InvalidRecipe, match="directory"):
        await pair.bob.seeker.find(str(pair.models / "math"))
    assert not pair.bob.shelf.experts()


async def test_minis_of_the_whole_catalogue_come_in_one_question(pair: Pair) -> None:
    moved: list[int] = []
    minis = await pair.bob.seeker.minis(moved.append)
    assert {str(mini.model_id) for mini in minis} == set(pair.ids.values()) and len(moved) == 1
    again: list[int] = []
    told = {mini.digest for mini in await pair.bob.seeker.minis(again.append)}
    assert told == {mini.digest for mini in minis} and not again


async def test_an_advert_whose_digests_do_not_belong_together_is_not_listened_to(pair: Pair) -> None:
    (model,) = (x.model for x in pair.bob.book.listings(time.time()) if x.model.name == "math")
    key = HostKey.generate()
    advert = Advert(
        network="test",
        peer=key.peer_id,
        seq=1,
        issued_at=int(time.time()),
        expires_at=int(time.time()) + 600,
        previous=None,
        models=(replace(model, name="better", sketch=sha256(b"better")),),
    )
    sealed = seal(PAYLOAD_TYPE, advert.to_bytes(), key).to_bytes()
    assert pair.bob.book.admit(sealed, time.time()).outcome is Outcome.NEW
    await pair.bob.seeker.find("math")  # which is in the cache from now on, by the digest that both name
    with pytest.raises(NotEnoughPeers, match="mini that it advertises"):
        await pair.bob.seeker.find("better")


async def test_weights_that_are_not_what_their_fingerprint_says_are_not_kept_and_everybody_hears(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def get(name: str, job: str) -> Any:
        request = {"model_id": pair.ids[name], "publisher": ""}
        pair.bob.jobs.start(job, Created(kind=JobKind.FETCH, title=name, request=request))
        async for view in pair.bob.jobs.watch(job):
            last = view.job
        return last

    honest = await get("code", "first-job")
    assert honest.state is JobState.SUCCEEDED and not accusations(pair.bob.faults)
    job = await get("false", "second-job")
    assert job.state is JobState.FAILED and job.error is not None
    assert job.error["kind"] == "FalseFingerprint" and job.error["exit_code"] == 5
    assert pair.alice.identity.publisher.key_id in job.error["why"]
    assert [expert.name for expert in pair.bob.shelf.experts()] == ["code"]
    assert not list(pair.bob.home.incoming.glob("*/*"))
    (accusation,) = accusations(pair.bob.faults)
    assert accusation.standing is Standing.FOUND
    assert accusation.finders == (pair.bob.identity.peer_id,)

    await until(lambda: bool(accusations(pair.alice.faults)))
    (heard,) = accusations(pair.alice.faults)
    assert heard.standing is Standing.SAID and heard.sworn.author.peer_id == pair.alice.identity.peer_id

    again = await get("false", "third-job")
    assert again.state is JobState.FAILED and "found before" in again.error["why"]
    assert not again.steps.get("received")
    with pytest.raises(NotEnoughPeers, match="found that fingerprint to be false"):
        await pair.bob.seeker.find("false")

    monkeypatch.setenv("WEFT_HOME", str(pair.bob.home.root))

    def told() -> tuple[list[Any], dict[str, Any], list[Any]]:
        with ControlClient.connect(pair.bob.home) as node:
            return node.peers(), {e.name: e for e in node.search("")}, node.faults()

    (peer,), experts, (fault,) = await asyncio.to_thread(told)
    assert (peer.fault, experts["false"].fault, experts["math"].fault) == ("found", "found", "")
    assert (fault.standing, fault.model_id) == ("found", pair.ids["false"])
    assert await asyncio.to_thread(main.run, ["search"]) == 0
    assert "FALSE" in capsys.readouterr().out


Weft = Callable[..., Awaitable[tuple[int, Any, str]]]


@pytest.fixture
def weft(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Weft:
    """`await weft("sim", "a", "b")` as Bob: exit code, the envelope on stdout, and stderr."""
    monkeypatch.setenv("WEFT_HOME", str(pair.bob.home.root))
    monkeypatch.chdir(tmp_path)

    async def run(*words: object) -> tuple[int, Any, str]:
        capsys.readouterr()
        code = await asyncio.to_thread(main.run, ["--json", *map(str, words)])
        said = capsys.readouterr()
        return code, json.loads(said.out), said.err

    return run


async def test_similarity_is_told_of_peers_and_directories_together(pair: Pair, weft: Weft) -> None:
    near = write(pair.models / "near", 1, 2, 3)
    code, told, _ = await weft("sim", "math", "code", near, "--base", "base")
    assert code == 0, told
    data = told["data"]
    assert [model["name"] for model in data["models"]] == ["math", "code", "near"]
    assert data["base"]["model_id"] == pair.ids["base"] and 0 < data["moved"] < 1_000_000
    cosine = data["measures"]["task_cosine"]
    assert all(abs(cosine[n][n] - 1) < 1e-6 for n in range(3))
    assert abs(cosine[0][1]) < 0.2 and cosine[0][2] > 0.5 and cosine[1][2] > 0.5
    assert data["measures"]["kl"] == [[None] * 3] * 3 and len(data["missing"]) == 1

    code, implied, _ = await weft("sim", "math", "code")
    assert code == 0 and implied["data"]["base"]["model_id"] == pair.ids["base"]
    code, failed, _ = await weft("sim", "math", "law")
    assert (code, failed["error"]["kind"]) == (4, "NotEnoughPeers")
    code, failed, _ = await weft("sim", "math", pair.ids["math"])
    assert code == 6 and "the same model" in failed["error"]["why"]
    code, failed, _ = await weft("sim", "math")
    assert code == 2 and "partners" in failed["error"]["hint"]


def fond_of(operator: str, folder: Path) -> Path:
    """A predictor that prefers one operator, the more the less task vectors have in common."""
    operators = ("linear", "task_arithmetic", "ties")
    bias = np.array([[0.9 if name == operator else 0.5 for name in operators]], np.float32)
    weights = np.array([[[-0.1 if name == operator else 0.0 for name in operators]]], np.float32)
    learned = Predictor(
        names=("task_cosine",),
        operators=operators,
        centre=np.zeros(1, np.float32),
        spread=np.ones(1, np.float32),
        flags=(),
        layers=(Layer(weights=weights, bias=bias),),
        provenance={"of": "a test"},
    )
    path = folder / f"{operator}.safetensors"
    path.write_bytes(learned.to_bytes())
    return path


async def test_a_plan_is_made_of_what_peers_hold_and_its_recipe_merges(
    pair: Pair, weft: Weft, tmp_path: Path
) -> None:
    fond = fond_of("task_arithmetic", tmp_path)
    written = tmp_path / "recipe.yaml"
    words = ("plan", "--auto", "math", "code", "--predictor", fond, "--explain")
    code, told, _ = await weft(*words, "-o", written)
    assert code == 0, told
    data = told["data"]
    assert data["best"]["chain"] == "task_arithmetic(math, code)" and data["considered"] == 3
    assert data["written"] == [str(written)] and not data["undecided"]
    assert data["best"]["utility"] > data["alternatives"][0]["utility"]
    assert [reason["feature"] for reason in data["reasons"]] == ["task_cosine"]
    assert data["missing"] == ["nothing is known of what these say: math, code"]
    assert 0 < data["moved"] < 1_000_000 and not list(pair.bob.home.parents.glob("*"))

    text = written.read_text()
    assert f"# {pair.ids['math']} is math" in text
    assert set(recipes.parse(text).models) == {pair.ids[name] for name in ("base", "math", "code")}
    code, merged, _ = await weft("merge", written, "-o", tmp_path / "merged")
    assert code == 0, merged
    assert (tmp_path / "merged" / "model.safetensors").is_file()

    code, told, _ = await weft(*words[:-1], "--tasks", "law")
    assert code == 6 and "'law'" in told["error"]["why"]
    code, told, _ = await weft("plan", "--auto", "math")
    assert code == 2
    code, told, _ = await weft("plan", "math", "--explain")
    assert code == 2 and "--auto" in told["error"]["why"]
    code, told, _ = await weft("plan", "--auto", "math", "code", "--predictor", written)
    assert (code, told["error"]["kind"]) == (5, "CorruptCheckpoint")


@pytest.mark.parametrize("name", ["a\u2028name: stolen is x", "a\n---\nmodels: []", "a\x85b: c"])
def test_no_name_of_a_model_writes_into_a_recipe(tmp_path: Path, name: str) -> None:
    base, one, other = (
        told_of(write(tmp_path / called, 0, *steps), called)
        for called, steps in {"base": (), "one": (1,), "other": (2,)}.items()
    )
    predictor = Predictor.parse(fond_of("ties", tmp_path).read_bytes())
    (text,) = auto.plan([replace(one, name=name), other], base, predictor).recipes
    bare = "\n".join(line for line in text.split("\n") if not line.startswith("#"))
    assert recipes.parse(text) == recipes.parse(bare)
    assert set(recipes.parse(text).models) == {model.reference for model in (base, one, other)}


def told_of(directory: Path, name: str) -> Candidate:
    """A model as whoever plans knows it, with the structure of what lies in a directory."""
    with Checkpoint.open(directory) as checkpoint:
        structure = compute(_Unchecked(checkpoint, {}))  # type: ignore[arg-type]
    model_id = ModelId(sha256(directory.name.encode()))
    made = Fingerprint(model_id=model_id, structure=structure, behaviour=None)
    return Candidate(reference=str(model_id), name=name, fingerprint=made, base=None, author=None, moved=0)


async def test_partners_are_found_among_all_that_is_advertised(
    pair: Pair, weft: Weft, tmp_path: Path
) -> None:
    mine = write(pair.models / "mine", 1, 9)
    fond = fond_of("task_arithmetic", tmp_path)
    code, told, _ = await weft("partners", mine, "--base", "base", "-n", "2", "--predictor", fond)
    assert code == 0, told
    data = told["data"]
    assert {p["name"] for p in data["partners"]} <= {"math", "code", "false"} and len(data["partners"]) == 2
    assert data["compared"] == 4 and 0 < data["moved"] < 1_000_000
    assert all(abs(p["task_cosine"]) < 0.3 for p in data["partners"])
    assert {p["operator"] for p in data["partners"]} == {"task_arithmetic"}
    predicted = [p["predicted"] for p in data["partners"]]
    assert predicted == sorted(predicted, reverse=True) and predicted[0] != predicted[1]


async def test_minis_of_models_that_nobody_shows_leave_room_for_others(
    pair: Pair, weft: Weft, tmp_path: Path
) -> None:
    mine, cache = write(pair.models / "mine", 1, 9), FingerprintCache(pair.bob.home.fingerprints)
    base = Mini.of((await pair.bob.seeker.find("base")).fingerprint)
    with Checkpoint.open(mine) as checkpoint:
        step = np.float64(Mini.of(print_of(checkpoint)).sketch) - base.sketch
    (model,) = (x.model for x in pair.bob.book.listings(time.time()) if x.model.name == "math")
    models = []
    for seed in range(3):  # of the same base, and in no way like what is asked for
        drawn = np.random.default_rng(seed).standard_normal(len(step))
        apart = drawn - drawn @ step / (step @ step) * step
        made_up = ModelId(sha256(b"made up %d" % seed))
        mini = replace(base, model_id=made_up, sketch=np.float32(base.sketch + 0.01 * apart))
        cache.put(mini.to_bytes())
        models.append(replace(model, model_id=made_up, name=f"lie {seed}", sketch=mini.digest))
    key = HostKey.generate()
    advert = Advert(
        network="test",
        peer=key.peer_id,
        seq=1,
        issued_at=int(time.time()),
        expires_at=int(time.time()) + 600,
        previous=None,
        models=tuple(sorted(models, key=lambda model: model.model_id)),
    )
    sealed = seal(PAYLOAD_TYPE, advert.to_bytes(), key).to_bytes()
    assert pair.bob.book.admit(sealed, time.time()).outcome is Outcome.NEW
    ranked = Index(await pair.bob.seeker.minis()).partners(
        replace(base, model_id=ModelId(sha256(b"mine")), sketch=np.float32(base.sketch + step)), 3, base=base
    )
    assert {partner.mini.model_id for partner in ranked} == {model.model_id for model in models}
    fond = fond_of("task_arithmetic", tmp_path)
    code, told, _ = await weft("partners", mine, "--base", "base", "-n", "2", "--predictor", fond)
    assert code == 0 and told["data"]["compared"] == 7
    assert len({p["name"] for p in told["data"]["partners"]} & {"math", "code", "false"}) == 2


def print_of(checkpoint: Checkpoint) -> Fingerprint:
    model = measure(checkpoint)
    structure = compute(VerifiedSource(checkpoint, model.leaves))
    return Fingerprint(model_id=model.manifest.model_id, structure=structure, behaviour=None)


def told_by(home: Home) -> Any:
    """The one outcome that a node knows."""
    with ControlClient.connect(home) as node:
        (record,) = node.outcomes()
    return record


async def test_an_outcome_that_one_node_measured_is_what_the_other_learns_from(pair: Pair) -> None:
    bob, alice = pair.bob, pair.alice
    first, second = await bob.seeker.find("math"), await bob.seeker.find("code")
    measured = Measured.of(
        pair=(first.fingerprint.digest, second.fingerprint.digest),
        operator="ties",
        plan=sha256(b"plan"),
        task="maths",
        items=sha256(b"items"),
        values=np.array([0.25]),
        missing=np.array([False]),
        names=("task_cosine",),
        utility=0.75,
    )

    def tell() -> str:
        with ControlClient.connect(bob.home) as node:
            return node.record_outcome(measured.to_bytes())

    assert await asyncio.to_thread(tell) == measured.digest
    await until(lambda: len(alice.outcomes.book.records()) == 1)

    record = await asyncio.to_thread(told_by, alice.home)
    assert record.author == bob.identity.peer_id and Measured.parse(record.outcome) == measured
    assert list(record.models) == [pair.ids["math"], pair.ids["code"]]
    assert record.again and not record.judged, "whoever holds both may be asked to try again"
    learned = Predictor.parse(fond_of("ties", alice.home.root).read_bytes())
    assert not (await asyncio.to_thread(told_by, bob.home)).again, "nobody checks himself"
    states = {
        outcomes.learned(learned, outcomes.heard(node.outcomes.book))[0].to_bytes() for node in (alice, bob)
    }
    assert len(states) == 1
