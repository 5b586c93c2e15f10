"""Real nodes, each its own process, on loopback: from a ticket to an audited merge, restarts and kills too.

The nodes live as long as this module. Nothing waits for a time: `until` asks again until the answer is there.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from safetensors.numpy import save_file

from merge_core.evolution.genome import Shape
from merge_core.evolution.record import SearchRecord
from node import app, config
from node.cli import follow, main
from node.config import Config
from node.control import running
from node.control.client import ControlClient
from node.control.status import ControlError
from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.domain.ticket import Ticket
from node.home import Home
from node.merging.evolve import Search
from node.provenance import audit

T = TypeVar("T")
Data = dict[str, Any]

PATIENCE = 40.0
CARD = "---\nlicense: {licence}\n---\nA tiny expert.\n"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}


def recipe(**names: object) -> str:
    """Base plus math plus half of code; `names` says what each of them is called instead."""
    base, math, code = (json.dumps(str(names.get(name, name))) for name in ("base", "math", "code"))
    return (
        f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n"
        f"  - {{model: {math}, parameters: {{weight: 1.0}}}}\n"
        f"  - {{model: {code}, parameters: {{weight: 0.5}}}}\n"
    )


def until(ask: Callable[[], T]) -> T:
    """Ask until there is an answer that counts as true; fails after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not (answer := ask()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)
    return answer


def write_expert(directory: Path, seed: int, *, licence: str = "apache-2.0", rows: int = 300_000) -> Path:
    """Three tensors in two dtypes (one of them of several leaves), config, words in an order, and a card."""
    directory.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    tensors = {
        "model.embed_tokens.weight": draw.standard_normal((64, 16), dtype=np.float32),
        "model.layers.0.mlp.up_proj.weight": draw.standard_normal(rows, dtype=np.float32),
        "model.norm.weight": np.ones(16, dtype=np.float16),
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(LLAMA))
    words = {f"w{word}": row for row, word in enumerate(draw.permutation(70)[:64].tolist())}
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": words}}))
    (directory / "README.md").write_text(CARD.format(licence=licence))
    return directory


def merge_alone(folder: Path, text: str) -> Data:
    """The result of a merge of local paths, by nobody and without a node."""
    (folder / "local.yml").write_text(text)
    wanted = app.read_recipe(folder / "local.yml")
    nobody = Home(folder / "nobody")
    return app.merge_here(nobody, wanted, folder / "alone", resume=False, on_view=lambda view: None)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, byte for byte."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def session(pid: int) -> list[int]:
    """The processes that a node started and that still live, itself included: they share its session."""
    alive = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, _, _, sid = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(sid) == pid and state != "Z":
            alive.append(int(entry.name))
    return alive


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node's home, and what its owner does with it."""

    home: Home
    peer_id: str

    def up(self) -> None:
        """Start it with what its config.toml says now."""
        app.start_detached(self.home, config.load(self.home.config))

    def ticket(self) -> str:
        """What somebody else joins with."""
        with follow.running_node(self.home) as node:
            return node.invite()

    def ask(self, question: Callable[[ControlClient], Any]) -> Data:
        return follow.ask(self.home, question)

    def search(self, query: str = "") -> dict[str, Data]:
        """The catalogue by name."""
        found = follow.ask_all(self.home, lambda node: node.search(query))
        return {expert["name"]: expert for expert in found}

    def knows(self, *names: str) -> dict[str, Data]:
        """The catalogue, once it has all these."""
        return until(lambda: (found := self.search()) and set(names) <= set(found) and found)

    def do(self, begin: Callable[[ControlClient], Any]) -> Data:
        """A job, followed to its end; raises what it failed with."""
        return follow.to_the_end(self.home, begin)

    def merge(self, recipe: str, target: Path, **options: Any) -> Data:
        """A merge job, followed to its end."""
        return self.do(lambda node: node.start_merge(recipe, target, **options))


@dataclass(frozen=True, kw_only=True)
class World:
    """Alice shares a base, an expert and one under a licence that nobody is granted; Bob shares another."""

    folder: Path
    network: str
    alice: Node
    bob: Node

    @property
    def models(self) -> dict[str, Path]:
        """What the experts were made from."""
        return {path.name: path for path in (self.folder / "models").iterdir()}

    def node(self, name: str) -> Node:
        """Another node of the network, not yet started and connected to nobody."""
        home = Home(self.folder / name)
        identity = app.initialise(home, now=time.time())
        settings = Config(network=self.network, listen=("/ip4/127.0.0.1/tcp/0",), peer_api="127.0.0.1:0")
        app.write_settings(home, settings)
        return Node(home=home, peer_id=identity.peer_id)


def _share(node: Node, models: Path, *names: str) -> None:
    for name in names:
        app.add(node.home, models / name, name=name, licence=None, on_progress=lambda count: None)


def _end(home: Home) -> None:
    """Stop a node however a test has left it."""
    found = running.find(home)
    if found is not None:
        os.kill(found.pid, signal.SIGKILL)
        until(lambda: not session(found.pid))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two nodes that met by a ticket, and have told each other what they hold."""
    folder = tmp_path_factory.mktemp("world")
    licences = {"base": "mit", "math": "apache-2.0", "code": "mit", "closed": "cc-by-nc-4.0"}
    for seed, (name, licence) in enumerate(licences.items()):
        write_expert(folder / "models" / name, seed, licence=licence)
    half = World(folder=folder, network=f"test-{secrets.token_hex(4)}", alice=None, bob=None)  # type: ignore[arg-type]
    made = replace(half, alice=half.node("alice"), bob=half.node("bob"))
    _share(made.alice, folder / "models", "base", "math", "closed")
    _share(made.bob, folder / "models", "code")
    try:
        with ThreadPoolExecutor() as both:
            list(both.map(Node.up, (made.alice, made.bob)))
        app.join(made.bob.home, made.alice.ticket())
        made.alice.knows("code")
        made.bob.knows("base", "math", "closed")
        yield made
    finally:
        for home in folder.glob("*/config.toml"):
            _end(Home(home.parent))


@pytest.fixture(scope="module")
def carol(world: World) -> Node:
    """Who comes late, holds nothing, and joins through Bob."""
    carol = world.node("carol")
    carol.up()
    app.join(carol.home, world.bob.ticket())
    return carol


@pytest.fixture(scope="module")
def merged(world: World) -> Data:
    """The job in which Bob merged his expert with what Alice holds, and published the result."""
    return world.bob.merge(recipe(), world.folder / "merged", publish_as="merged")


def test_who_joins_by_a_ticket_is_a_peer_and_sees_what_there_is(world: World) -> None:
    (peer,) = follow.ask_all(world.bob.home, lambda node: node.peers())
    assert peer["peer_id"] == world.alice.peer_id and peer["experts"] == 3
    found = world.bob.search()
    assert found["math"]["holders"] == [world.alice.peer_id] and not found["math"]["local"]
    assert found["code"]["local"] and found["code"]["holders"] == []
    assert (found["base"]["licence"], found["closed"]["licence"]) == ("MIT", "CC-BY-NC-4.0")
    status = world.bob.ask(lambda node: node.status())
    assert status["peer_id"] == world.bob.peer_id and status["network"] == world.network
    assert all(address.endswith(f"/p2p/{world.bob.peer_id}") for address in status["addresses"])
    assert status["pid"] in session(status["pid"])


def test_a_late_joiner_hears_what_was_said_before_it_came(world: World, carol: Node) -> None:
    found = carol.knows("base", "math", "code", "closed")
    assert found["math"]["holders"][0] == world.alice.peer_id
    assert world.bob.peer_id in found["code"]["holders"]


def test_a_merge_gives_the_same_model_from_peers_from_paths_and_elsewhere(
    world: World, carol: Node, merged: Data, tmp_path: Path
) -> None:
    carol.knows("base", "math", "code")
    elsewhere = carol.merge(recipe(), tmp_path / "elsewhere")
    here = merge_alone(tmp_path, recipe(**world.models))
    assert here["model_id"] == merged["model_id"] == elsewhere["model_id"]
    made = (Path(job["directory"]) / "model.safetensors" for job in (here, merged, elsewhere))
    assert len({path.read_bytes() for path in made}) == 1


def test_the_tokenizers_of_peers_are_read_to_plan_a_merge_of_all_their_tokens(
    world: World, carol: Node, tmp_path: Path
) -> None:
    carol.knows("base", "math", "code")
    union = "tokenizer_source: union\n"
    elsewhere = carol.merge(recipe() + union, tmp_path / "elsewhere")
    here = merge_alone(tmp_path, recipe(**world.models) + union)
    assert here["model_id"] == elsewhere["model_id"]
    config = json.loads((Path(here["directory"]) / "config.json").read_text())
    words = [
        json.loads((path / "tokenizer.json").read_text())["model"]["vocab"] for path in world.models.values()
    ]
    assert 64 < config["vocab_size"] <= len(set().union(*words))


def test_a_merge_from_peers_tells_who_agreed_and_who_sent_what(world: World, merged: Data) -> None:
    found = world.bob.search()
    bought = [model for item in merged["agreements"] for model in item["models"]]
    assert sorted(bought) == sorted(found[name]["model_id"] for name in ("base", "math"))
    assert {item["provider"] for item in merged["agreements"]} == {world.alice.peer_id}
    (transfer,) = merged["transfers"]
    assert transfer["peer_id"] == world.alice.peer_id
    assert 0 < transfer["bytes"] <= sum(found[name]["size"] for name in ("base", "math")) + (64 << 10)

    key = world.folder / "bob.pem"
    key.write_text(app.identity(world.bob.home).publisher.public_pem)
    report = app.verify(world.folder / "merged", key)
    assert report.ok, report.to_json()
    assert any("agreement" in check.name for check in report.checks)


def test_what_was_fetched_for_a_merge_is_not_passed_on(world: World, merged: Data) -> None:
    assert {expert.name for expert in app.shelf(world.bob.home).experts()} == {"code", "merged"}
    seen = world.alice.knows("merged")
    assert world.bob.peer_id not in seen["math"]["holders"]
    assert seen["merged"]["holders"] == [world.bob.peer_id]
    assert seen["merged"]["model_id"] == merged["model_id"]
    assert seen["merged"]["licence"] == merged["licence"] == "Apache-2.0"  # of Apache-2.0 and MIT
    assert merged["report"]["measured"] == 3 and merged["report"]["lines"][1] == "nothing stands out"


def test_limits_and_texts_reach_the_node_that_merges(world: World, merged: Data) -> None:
    target, text = world.folder / "limited", world.folder / "text"
    text.write_text("abc")
    wanted = recipe()
    for how, code in (({"max_memory": 1 << 20}, 7), ({"threads": 1000}, 2), ({"perplexity": "text"}, 2)):
        with pytest.raises(ControlError) as caught:
            world.bob.merge(wanted, target, how=how)
        assert caught.value.exit_code == code and not target.exists(), how
    job = world.bob.merge(wanted, target, how={"threads": 1, "max_memory": 1 << 30, "perplexity": str(text)})
    assert job["model_id"] == merged["model_id"]
    assert job["report"]["text"].startswith("3 bytes of text, sha256:") and not job["report"]["readings"]


def test_a_third_node_audits_the_merge_and_leaves_a_claim(world: World, carol: Node, merged: Data) -> None:
    carol.knows("merged", "base", "math", "code")
    job = carol.do(lambda node: node.start_audit(merged["model_id"]))
    leaves = 2 + (300_000 * 4 >> 20) + 1
    assert (job["audit"]["passed"], job["audit"]["checked"], job["audit"]["failed"]) == (True, leaves, 0)
    claims = [audit.Claim.parse(line) for line in carol.home.claims.read_bytes().splitlines()]
    verdict = claims[-1].verdict
    assert (verdict.auditor, verdict.model_id, verdict.passed) == (carol.peer_id, merged["model_id"], True)
    assert {item["purpose"] for item in job["agreements"]} == {"audit"}
    assert list(carol.home.parents.iterdir()) == [], "what an audit fetched is for that audit alone"


def test_get_makes_a_second_holder_byte_for_byte(world: World, carol: Node) -> None:
    wanted = carol.knows("math")["math"]
    job = carol.do(lambda node: node.start_get("math"))
    assert [item["purpose"] for item in job["agreements"]] == ["mirror"]
    theirs = app.shelf(world.alice.home).resolve("math")
    assert job["model_id"] == theirs.model_id == wanted["model_id"]
    assert contents(Path(job["directory"])) == contents(theirs.directory)
    until(lambda: carol.peer_id in world.bob.search()["math"]["holders"])
    key = world.folder / "alice.pem"
    key.write_text(app.identity(world.alice.home).publisher.public_pem)
    assert app.verify(Path(job["directory"]), key).ok


def test_a_licence_that_is_not_granted_is_refused_with_its_sentence(world: World) -> None:
    before = sorted(world.bob.home.root.glob("[eip]*/**/*"))
    with pytest.raises(ControlError) as caught:
        world.bob.do(lambda node: node.start_get("closed"))
    error = caught.value
    assert (error.kind, error.exit_code) == ("Refused", 1)
    assert Reason.LICENCE_NOT_GRANTED.sentence in error.why and error.hint == "weft search"
    target = world.folder / "never"
    with pytest.raises(ControlError, match="does not grant the licence"):
        world.bob.merge(recipe(math="closed"), target)
    assert sorted(world.bob.home.root.glob("[eip]*/**/*")) == before
    assert not target.exists() and not list(world.folder.glob(".never*"))


def test_a_restarted_node_is_who_it_was_and_knows_what_it_knew(world: World, carol: Node) -> None:
    known = carol.knows("base", "math", "code", "closed")
    first = carol.ask(lambda node: node.announce())
    joined = config.load(carol.home.config)
    app.stop(carol.home)
    app.write_settings(carol.home, replace(joined, bootstrap=()))
    carol.up()
    alone = carol.ask(lambda node: node.status())
    assert (alone["peer_id"], alone["peers"]) == (carol.peer_id, 0)
    assert carol.search().keys() == known.keys()
    assert carol.ask(lambda node: node.announce())["sequence"] > first["sequence"] > 0

    app.join(carol.home, world.bob.ticket())
    new = carol.ask(lambda node: node.announce())["sequence"]
    assert new > first["sequence"]
    assert config.load(carol.home.config) == joined


def _merging(node: Node) -> int:
    """Wait until the newest job merges; the process id of its worker."""
    pid = node.ask(lambda it: it.status())["pid"]
    until(lambda: follow.ask_all(node.home, lambda it: it.jobs())[0]["state"] == "merging")
    return int(until(lambda: [each for each in session(pid) if each != pid])[0])


def test_a_node_that_is_stopped_or_killed_in_a_merge_takes_it_up_at_the_next_start(
    world: World, tmp_path: Path
) -> None:
    models = {
        name: write_expert(tmp_path / name, seed, rows=8_000_000)
        for seed, name in enumerate(("base", "math", "code"))
    }
    dave = world.node("dave")
    dave.up()
    pid = dave.ask(lambda node: node.status())["pid"]
    target = tmp_path / "out"
    job = dave.ask(lambda node: node.start_merge(recipe(**models), target))

    _merging(dave)
    app.stop(dave.home)
    until(lambda: session(pid) == [])
    assert not target.exists()

    dave.up()
    pid = dave.ask(lambda node: node.status())["pid"]
    worker = _merging(dave)
    os.kill(pid, signal.SIGKILL)
    until(lambda: session(pid) == [])
    assert worker != pid and not target.exists() and (tmp_path / ".out.weft").exists()
    until(lambda: not app.node_runs(dave.home))  # its last thread holds the lock for a moment longer

    dave.up()
    done = dave.do(lambda node: next(node.watch(job["id"])))
    assert (done["state"], done["directory"]) == ("succeeded", str(target))
    assert done["model_id"] == merge_alone(tmp_path, recipe(**models))["model_id"]
    assert app.verify(target, None).ok
    assert [path.name for path in tmp_path.glob(".*")] == []


# -- searches ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Seekers:
    """Alice shares a base and an expert, Bob holds another one and seeks; `desk` is where he works."""

    alice: Node
    bob: Node
    desk: Path

    def search(self, **more: Any) -> Search:
        sought = (str(self.desk / "words.jsonl"),)
        return Search(tasks=sought, shape=Shape(), processes=1, **more)

    @property
    def recipe(self) -> str:
        """Two by their names in the catalogue, one by where it lies."""
        return recipe(base="base", math="math", code=self.desk / "code")

    def started(self, target: Path, **more: Any) -> Data:
        """A search job, begun."""
        search = self.search(**more)
        asked = {**search.to_json(), "processes": search.processes}
        return self.bob.ask(lambda node: node.start_evolve(self.recipe, target, asked))

    def seen(self, job: Data, generation: int) -> None:
        """Watch a search until it has told of a generation."""
        with follow.running_node(self.bob.home) as node:
            assert any(now.generation.number >= generation for now in node.watch(job["id"]))


@pytest.fixture
def seekers(llamas: Callable[[Path], None], tmp_path: Path) -> Iterator[Seekers]:
    """Two nodes in a network of their own, with models that can be run."""
    apart = World(folder=tmp_path / "nodes", network=f"test-{secrets.token_hex(4)}", alice=None, bob=None)  # type: ignore[arg-type]
    alice, bob, desk = apart.node("alice"), apart.node("bob"), tmp_path / "desk"
    llamas(desk)
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefgh") for _ in range(5)) for _ in range(40)]
    lines = (json.dumps({"prompt": f"{word}=", "answer": word[::-1]}) + "\n" for word in words)
    (desk / "words.jsonl").write_text("".join(lines))
    _share(alice, desk, "base", "math")
    try:
        for node in (alice, bob):
            node.up()
        app.join(bob.home, alice.ticket())
        bob.knows("base", "math")
        yield Seekers(alice=alice, bob=bob, desk=desk)
    finally:
        for node in (alice, bob):
            _end(node.home)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_with_what_a_peer_holds_survives_kill_9_and_ends_as_one_in_the_foreground(
    seekers: Seekers,
) -> None:
    desk, bob, target = seekers.desk, seekers.bob, seekers.desk / "found"
    (desk / "here.yml").write_text(recipe(**{name: desk / name for name in ("base", "math", "code")}))
    here = app.evolve_here(
        Home(desk / "nobody"),
        app.read_recipe(desk / "here.yml"),
        desk / "here",
        seekers.search(budget=480),
        resume=False,
        on_view=lambda view: None,
    )

    pid = bob.ask(lambda node: node.status())["pid"]
    job = seekers.started(target, budget=480)
    seekers.seen(job, 2)
    os.kill(pid, signal.SIGKILL)
    until(lambda: session(pid) == [] and not app.node_runs(bob.home))
    journal = desk / ".found.weft-search" / "journal"
    left = journal.read_bytes()
    assert left.count(b"\n") > 12 and not target.exists()

    bob.up()
    until(lambda: bob.ask(lambda node: node.status())["peers"])
    seekers.seen(job, 2)
    assert journal.read_bytes().startswith(left), "it goes on where it was"
    done = bob.do(lambda node: next(node.watch(job["id"])))
    records = [
        SearchRecord.parse((path / "weft.search.json").read_bytes()) for path in (desk / "here", target)
    ]
    assert done["kind"] == "evolve" and done["model_id"] == here["model_id"]
    assert records[0] == records[1] and records[0].evaluated > 400
    assert done["search"] == here["search"]
    assert [path.name for path in desk.glob(".*")] == []

    # What it fetched was agreed on twice: for the merge it began with, and for the one that it found.
    assert [len(item["models"]) for item in done["agreements"]] == [2, 2]
    assert done["transfers"][0]["peer_id"] == seekers.alice.peer_id
    report = app.verify(target, None)
    (agreed,) = (check.detail for check in report.checks if check.name == "agreements")
    assert report.ok and agreed == "1 signed by both sides, for 2 of 3 parents"
    assert not bob.home.parents.exists() or list(bob.home.parents.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_is_settled_cancelled_and_resumed(seekers: Seekers, weft: Weft) -> None:
    bob, desk = seekers.bob, seekers.desk
    (desk / "recipe.yml").write_text(seekers.recipe)
    words = ("evolve", desk / "recipe.yml", "-o", desk / "found", "--tasks", desk / "words.jsonl")
    many = (*words, "--budget", 100_000, "--processes", 1)
    job = seekers.started(desk / "found", budget=100_000)
    assert "exists" in failed(weft, bob, *words, "-o", desk / "code")["why"]
    seekers.seen(job, 1)
    assert "lies here" in failed(weft, bob, *many)["why"]
    assert "is running" in failed(weft, bob, *many, "--resume")["why"]
    assert weft(bob, "jobs", "cancel", job["id"])[1]["data"]["state"] == "cancelled"
    assert "no search that goes on" in failed(weft, bob, "jobs", "settle", job["id"])["why"]
    assert "has another budget" in failed(weft, bob, *words, "--resume")["why"]

    child = subprocess.Popen(
        [sys.executable, "-P", "-c", INTERRUPTIBLE, *map(str, many), "--resume"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "WEFT_HOME": str(bob.home.root)},
        start_new_session=True,
    )
    assert child.stdout is not None and child.stderr is not None
    assert any(line.startswith("generation 2") for line in child.stderr)
    child.send_signal(signal.SIGINT)
    told, printed = child.stderr.read(), child.stdout.read()
    assert child.wait() == 0, told
    assert "stopping: the best so far is merged" in told and "0 of 100000 candidates" not in told
    report = app.verify(desk / "found", None)
    assert report.ok and report.model_id == printed.strip()
    (ended,) = follow.ask_all(bob.home, lambda node: node.jobs())
    assert (ended["id"], ended["state"]) == (job["id"], "succeeded")
    assert ended["search"]["generations"] >= 2
    assert [path.name for path in desk.glob(".*")] == []


INTERRUPTIBLE = """
import signal
from node.cli.main import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
main()
"""
Weft = Callable[..., tuple[int, Data, str]]
STRANGER = PeerId("12D3KooWRBhwfeP2Y4TCx1SM6s9rUoHhR5STiGwxBhgFRcw3UERE")


@pytest.fixture
def weft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Weft:
    """`weft(node, "get", "ghost")`: exit code, the envelope on stdout, and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(node: Node, *words: object) -> tuple[int, Data, str]:
        monkeypatch.setenv("WEFT_HOME", str(node.home.root))
        capsys.readouterr()
        code = main.run(["--json", *map(str, words)])
        said = capsys.readouterr()
        return code, json.loads(said.out), said.err

    return run


def failed(weft: Weft, node: Node, *words: object) -> Data:
    """The error of a command that must fail: one envelope, one line why, one next command."""
    code, envelope, told = weft(node, *words)
    error: Data = envelope["error"]
    assert code == error["exit_code"] != 0 and envelope["ok"] is False
    assert f"error: {error['why']}\n" in told and told.endswith(f"next:  {error['hint']}\n")
    assert re.search(r"(weft|ls|mkdir) ", error["hint"])
    return error


def test_what_nobody_holds_is_told_and_leaves_nothing(world: World, weft: Weft, tmp_path: Path) -> None:
    some = f"sha256:{'ab' * 32}"
    for text in ("ghost", some, f"peer://{STRANGER}/{some}"):
        (tmp_path / "recipe.yml").write_text(recipe(math=text))
        before = sorted(tmp_path.iterdir())
        for words in (("plan", "recipe.yml"), ("merge", "recipe.yml", "-o", "out")):
            error = failed(weft, world.bob, *words)
            assert error["exit_code"] == 4 and text.rpartition("/")[2] in error["why"], error
        assert sorted(tmp_path.iterdir()) == before
    assert failed(weft, world.bob, "get", "ghost")["hint"] == "weft search"
    for publisher, code in ((some, 4), ("me", 2)):
        error = failed(weft, world.bob, "get", "closed", "--publisher", publisher)
        assert error["exit_code"] == code and publisher in error["why"]
    known = world.bob.search()["closed"]["model_id"]
    (tmp_path / "recipe.yml").write_text(recipe(math=f"peer://{STRANGER}/{known}"))
    assert failed(weft, world.bob, "merge", "recipe.yml", "-o", "out")["exit_code"] == 4


def test_a_place_that_takes_no_model_is_named(world: World, weft: Weft) -> None:
    error = failed(weft, world.bob, "merge", _written(recipe()), "-o", "/proc/out")
    assert "/proc/.out" in error["why"] and "Errno" not in error["why"]
    assert error["hint"].startswith("ls -ld /proc/") and error["exit_code"] == 1


def _written(text: str) -> Path:
    path = Path("recipe.yml")
    path.write_text(text)
    return path


def test_models_that_do_not_fit_are_told_before_anything_is_fetched(
    world: World, weft: Weft, tmp_path: Path
) -> None:
    write_expert(tmp_path / "other", 9, rows=1000)
    (tmp_path / "recipe.yml").write_text(recipe(code=tmp_path / "other"))
    before = sorted(tmp_path.iterdir())
    error = failed(weft, world.bob, "merge", "recipe.yml", "-o", "out")
    assert (error["kind"], error["exit_code"]) == ("Unmergeable", 6)
    assert "up_proj" in error["problems"][0] and sorted(tmp_path.iterdir()) == before


def test_a_refusal_is_a_sentence_and_a_command(world: World, weft: Weft) -> None:
    error = failed(weft, world.bob, "get", "closed")
    assert (error["kind"], error["exit_code"]) == ("Refused", 1)
    assert error["why"].startswith(Reason.LICENCE_NOT_GRANTED.sentence)


def test_a_ticket_that_leads_nowhere_or_elsewhere_changes_nothing(world: World, weft: Weft) -> None:
    settings = config.load(world.bob.home.config)
    nowhere = Ticket(network=world.network, addresses=(f"/ip4/127.0.0.1/tcp/1/p2p/{STRANGER}",))
    elsewhere = Ticket(network="elsewhere", addresses=nowhere.addresses)
    assert failed(weft, world.bob, "join", nowhere)["exit_code"] == 4
    assert "'elsewhere'" in failed(weft, world.bob, "join", elsewhere)["why"]
    assert config.load(world.bob.home.config) == settings


def test_a_home_has_one_node_and_its_token_opens_it(world: World, weft: Weft) -> None:
    erin = world.node("erin")
    erin.up()
    assert failed(weft, erin, "up", "-d")["hint"] == "weft status"
    pid = erin.ask(lambda node: node.status())["pid"]
    erin.home.token.write_text("guessed")
    error = failed(weft, erin, "status")
    assert (error["exit_code"], error["hint"]) == (5, "weft down && weft up -d")
    assert weft(erin, "down")[:2] == (0, {"schema": "weft.cli/v1", "ok": True, "data": {"stopped": True}})
    until(lambda: session(pid) == [])
    assert failed(weft, erin, "status")["exit_code"] == 3


def test_verify_lets_the_node_fetch_the_parents_for_an_audit(world: World, merged: Data, weft: Weft) -> None:
    frank = world.node("frank")
    directory = merged["directory"]
    assert failed(weft, frank, "verify", directory, "--audit", "full")["exit_code"] == 4
    frank.up()
    app.join(frank.home, world.bob.ticket())
    frank.knows("base", "math", "code")
    code, envelope, told = weft(frank, "verify", directory, "--audit", "full")
    checks = {check["name"]: check for check in envelope["data"]["checks"]}
    assert code == 0 and checks["audit"]["ok"] and "0 differ" in checks["audit"]["detail"]
    assert "the node fetches it" in told
    (job,) = follow.ask_all(frank.home, lambda node: node.jobs())
    assert (job["kind"], job["state"]) == ("audit", "succeeded")
    assert {item["purpose"] for item in job["agreements"]} == {"audit"}
    assert {item["provider"] for item in job["agreements"]} >= {world.alice.peer_id, world.bob.peer_id}
    assert app.shelf(frank.home).experts() == ()


def test_jobs_are_listed_and_found_by_the_beginning_of_their_id(
    world: World, merged: Data, weft: Weft
) -> None:
    _, envelope, _ = weft(world.bob, "jobs", "ls")
    (job,) = (each for each in envelope["data"]["jobs"] if each["id"] == merged["id"])
    assert (job["kind"], job["state"], job["model_id"]) == ("merge", "succeeded", merged["model_id"])
    code, envelope, _ = weft(world.bob, "jobs", "watch", merged["id"][:8])
    assert code == 0 and envelope["data"] == job
    assert weft(world.bob, "jobs", "cancel", merged["id"])[1]["data"]["state"] == "succeeded"
    assert failed(weft, world.bob, "jobs", "watch", "nothing")["hint"] == "weft jobs ls"
