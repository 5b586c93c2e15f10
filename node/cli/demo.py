"""`weft demo`: three real nodes on this machine, from training small experts to an audited merge.

Everything is what a user would do by hand: processes of their own, homes of their own, tickets, adverts,
agreements, shards over mutual TLS. Only the experts are small. Each step is told as it happens.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from node.cli import follow, render
from node.cli.output import escape, out, size, table
from node.home import Home

NODES = ("node 1", "node 2", "node 3")
FIND_SECONDS = 60.0
POLL_SECONDS = 0.1


def register(app: typer.Typer) -> None:
    """Hang the verb on the command."""
    app.command(rich_help_panel="Start here")(demo)


def demo(
    seed: Annotated[int, typer.Option(help="Of the experts' training.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the nodes up, to go on with the CLI.")] = False,
) -> None:
    """Run three local nodes that find each other, merge really trained experts, verify and audit."""
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="weft-demo-"))
    story = Story(folder=folder, seed=seed)
    with ExitStack() as stack:
        if not keep:
            stack.callback(story.stop)
        story.train()
        story.start()
        story.find()
        story.plan()
        story.merge()
        story.score()
        story.verify()
        story.tamper()
    data = {**story.told, "seconds": round(time.monotonic() - began, 1)}
    _farewell(story, keep)
    _judge(data)
    out.result(data, lambda console: _summary(console, data))


@dataclass(slots=True)
class Story:
    """One demo: what it has found out so far is in `told`, which is what `--json` prints."""

    folder: Path
    seed: int
    told: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Path] = field(default_factory=dict)
    homes: dict[str, Home] = field(default_factory=dict)
    peers: dict[str, str] = field(default_factory=dict)

    @property
    def recipe(self) -> Path:
        """The recipe that node 2 asks for."""
        return self.folder / "recipe.yml"

    @property
    def merged(self) -> Path:
        """Where the merged model lies."""
        return self.folder / "merged"

    def train(self) -> None:
        """Train the base and three experts, or take those of an earlier demo."""
        from node import app

        _step("Train three experts from one base", "a 194 k parameter Llama; each learns one task")
        with render.live(out) as show:
            zoo = app.zoo(self.seed, on_event=lambda event: show(_progress(event)))
        self.models = {"base": Path(zoo["base"])} | {k: Path(v) for k, v in zoo["experts"].items()}
        out.say(f"   {', '.join(self.models)} in {escape(str(Path(zoo['base']).parent))}")

    def start(self) -> None:
        """Give each node a home and an identity, share its experts, start it as a process."""
        from node import app
        from node.config import Config

        _step("Start three nodes", "each its own process, keys and home, on a network that nobody else is on")
        network = f"demo-{secrets.token_hex(4)}"
        experts = list(self.models)[1:]
        shares = dict(zip(NODES, (["base", *experts[:2]], experts[2:], []), strict=True))
        for name in NODES:
            home = Home(self.folder / name.replace(" ", ""))
            identity = app.initialise(home, now=time.time())
            for model in shares[name]:
                base = None if model == "base" else str(self.models["base"])
                app.add(
                    home,
                    self.models[model],
                    name=model,
                    licence=None,
                    base=base,
                    probes="zoo",
                    on_progress=lambda count: None,
                )
            self.homes[name], self.peers[identity.peer_id] = home, name
            settings = Config(
                network=network, listen=("/ip4/127.0.0.1/tcp/0",), peer_api="127.0.0.1:0", probes="zoo"
            )
            app.write_settings(home, settings)
            app.start_detached(home, settings)
            holds = ", ".join(shares[name]) or "nothing: it will audit"
            out.say(f"   [bold]{name}[/] {identity.peer_id}  holds {holds}")
        with follow.running_node(self.homes["node 1"]) as node:
            ticket = node.invite()
        for name in NODES[1:]:
            app.join(self.homes[name], ticket)
        self.told["nodes"] = [follow.ask(self.homes[n], lambda node: node.status()) for n in NODES]

    def find(self) -> None:
        """Wait until every expert is in every catalogue, and tell who found whom."""
        _step("Find each other", "nodes 2 and 3 joined by the ticket of node 1; adverts came by gossip")
        for name in NODES[1:]:
            _wait_for(self.homes[name], set(self.models))
            seen = follow.ask_all(self.homes[name], lambda node: node.peers())
            out.say(f"   [bold]{name}[/] found {', '.join(self._name(p['peer_id']) for p in seen)}")
        data = follow.ask_all(self.homes["node 2"], lambda node: node.search(""))
        rows = ((e["name"], render.short(e["model_id"]), e["licence"], self._holders(e)) for e in data)
        out.story_console.print(table("", ("expert", "model id", "licence", "held by"), rows))

    def plan(self) -> None:
        """Write the recipe and let node 2 resolve it."""
        from node import app

        _step("Plan", "node 2 resolves the recipe from headers alone: no weights have moved")
        experts = "".join(
            f"  - model: {name}\n    parameters: {{weight: 1.0}}\n" for name in list(self.models)[1:]
        )
        self.recipe.write_text(f"merge_method: task_arithmetic\nbase_model: base\nmodels:\n{experts}")
        recipe = app.read_recipe(self.recipe).to_yaml()
        data = follow.ask(self.homes["node 2"], lambda node: node.plan(recipe))
        render.plan(out.story_console, data)
        self.told["plan"] = data["plan"]

    def merge(self) -> None:
        """Negotiate, fetch, merge and publish on node 2."""
        from node import app

        _step("Negotiate, fetch, merge", "node 2 asks for what it lacks, and merges on its own machine")
        text = app.read_recipe(self.recipe).to_yaml()
        job = follow.to_the_end(
            self.homes["node 2"], lambda node: node.start_merge(text, self.merged, publish_as="merged")
        )
        for agreement in job["agreements"]:
            models = ", ".join(render.short(model) for model in agreement["models"])
            provider = self._name(agreement["provider"])
            out.say(f"   {provider} agrees to give {models} for a {agreement['purpose']}, signed by both")
        self.told["transfer"] = {
            item["peer_id"]: {
                "bytes": item["bytes"],
                "mb_s": round(item["bytes"] / 1e6 / max(item["seconds"], 1e-9), 1),
            }
            for item in job["transfers"]
        }
        for peer, moved in self.told["transfer"].items():
            amount = f"{size(moved['bytes'])} from {self._name(peer)} at {moved['mb_s']} MB/s"
            out.say(f"   {amount}, every MiB verified before it was written")
        self.told |= {
            "agreements": job["agreements"],
            "model_id": job["model_id"],
            "model_dir": str(self.merged),
            "publisher_key": str(self._publisher_key()),
        }
        out.say(f"   [bold]{job['model_id']}[/]")

    def score(self) -> None:
        """Score base, experts and merge on items that nothing was trained on."""
        from node import app
        from node.evaluation import Measuring

        _step("Score", "exact match in percent on 400 unseen items of each task")
        domains = list(self.models)[1:]
        found = app.evaluate(
            self.homes["node 2"],
            {**self.models, "merged": self.merged},
            Measuring(tasks=tuple(f"{domain}:test" for domain in domains)),
            on_event=lambda event: None,
        )
        shares = dict(zip(domains, (row["values"] for row in found["tasks"]), strict=True))
        scores = {
            model["name"]: {domain: shares[domain][place] for domain in domains}
            for place, model in enumerate(found["models"])
        }
        rows = [
            (name, *(f"{100 * found[d]:.1f}" for d in domains), f"{100 * _mean(found):.1f}")
            for name, found in scores.items()
        ]
        out.story_console.print(table("", ("model", *domains, "mean"), rows))
        self.told["scores"] = scores

    def verify(self) -> None:
        """Verify on node 2, then let node 3 fetch the result and execute the merge again."""
        from node import app

        _step("Verify", "signatures, digests and provenance of the merged directory, pinned to node 2's key")
        report = app.verify(self.merged, Path(self.told["publisher_key"]))
        render.report(out.story_console, report.to_json())
        self.told["verified"] = report.ok
        _step(
            "Audit", "node 3 fetches the model and its parents, executes the merge again, compares every leaf"
        )
        _wait_for(self.homes["node 3"], {"merged"})
        job = follow.to_the_end(self.homes["node 3"], lambda node: node.start_audit(self.told["model_id"]))
        kept = shutil.copy(job["audit"]["statement"], self.folder / "claims.jsonl")
        self.told["audit"] = {**job["audit"], "statement": str(kept)}
        verdict = "[green]PASSED[/]" if job["audit"]["passed"] else "[red]FAILED[/]"
        out.say(
            f"   {job['audit']['checked']} leaves computed again, {job['audit']['failed']} differ: {verdict}"
        )

    def tamper(self) -> None:
        """Flip one bit of a copy and see it refused."""
        from node import app

        _step("Tamper", "one bit of one weight is flipped in a copy")
        copy = self.folder / "tampered"
        shutil.copytree(self.merged, copy)
        weights = copy / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        report = app.verify(copy, None)
        shutil.rmtree(copy)
        for check in report.checks:
            if check.ok is False:
                out.say(f"   [red]✗[/] {check.name}: {escape(check.detail)}")
        self.told["tampered_refused"] = not report.ok

    def stop(self) -> None:
        """Stop the nodes and remove their homes; the merged model and the key stay."""
        from node import app
        from node.errors import WeftError

        for home in self.homes.values():
            try:
                if app.node_runs(home):
                    app.stop(home)
            except WeftError as error:
                out.say(f"[yellow]{escape(error.why)}[/]  {escape(error.hint)}")
            shutil.rmtree(home.root, ignore_errors=True)

    def _publisher_key(self) -> Path:
        from node import app

        path = self.folder / "publisher.pem"
        path.write_text(app.identity(self.homes["node 2"]).publisher.public_pem)
        return path

    def _name(self, peer: str) -> str:
        return self.peers.get(peer, peer)

    def _holders(self, expert: dict[str, Any]) -> str:
        return ", ".join(["node 2"] * expert["local"] + [self._name(peer) for peer in expert["holders"]])


def _step(title: str, what: str) -> None:
    out.say()
    out.say(f"[bold cyan]{title}[/]  [dim]{what}[/]")


def _progress(event: dict[str, Any]) -> dict[str, Any]:
    """A worker's event as what `live` shows."""
    progress = event if event.get("kind") == "progress" else None
    return {"state": "training", "waiting_on": "", "progress": progress}


def _wait_for(home: Home, names: set[str]) -> None:
    """Return once a node's catalogue has all these names; raises NotEnoughPeers after a minute."""
    from node.errors import NotEnoughPeers

    deadline = time.monotonic() + FIND_SECONDS
    while True:
        found = {expert["name"] for expert in follow.ask_all(home, lambda node: node.search(""))}
        if names <= found:
            return
        if time.monotonic() > deadline:
            raise NotEnoughPeers(f"nobody advertises {', '.join(sorted(names - found))}", hint="weft doctor")
        time.sleep(POLL_SECONDS)


def _judge(data: dict[str, Any]) -> None:
    """Raise VerificationFailed when the demo did not show what it is there to show."""
    from node.errors import VerificationFailed

    shown = {
        "the merged model verifies": data["verified"],
        "the audit passes": data["audit"]["passed"],
        "the tampered copy is refused": data["tampered_refused"],
    }
    wrong = [what for what, true in shown.items() if not true]
    if wrong:
        raise VerificationFailed(f"not so: {'; '.join(wrong)}", hint=f"weft verify {data['model_dir']}")


def _mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def _farewell(story: Story, keep: bool) -> None:
    out.say()
    if not keep:
        out.say(f"The merged model and its publisher's key stay in {escape(str(story.folder))}")
        out.say("To go on with the nodes up: [bold]weft demo --keep[/]")
        return
    out.say("The nodes are up. Go on as one of them:")
    for name, home in story.homes.items():
        out.say(
            f"   [bold]export WEFT_HOME={escape(str(home.root))}[/]  # {name}; then: weft status, weft search"
        )
    out.say("   [bold]weft down[/] stops it")


def _summary(console: Console, data: dict[str, Any]) -> None:
    console.print(f"model     {data['model_id']}")
    console.print(f"lies in   {data['model_dir']}")
    console.print(f"verified  {data['verified']}")
    audit = data["audit"]
    console.print(f"audited   {audit['checked']} leaves, {audit['failed']} differ")
    console.print(f"tampered  {'refused' if data['tampered_refused'] else 'NOT REFUSED'}")
    console.print(f"took      {data['seconds']} s")
