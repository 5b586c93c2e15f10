"""What verbs without a running node do, put together from the services; `daemon` puts the node together.

Services are imported where they are put together: `weft --help` loads none of them.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from node.errors import LocalError, NodeNotRunning, UsageError, VerificationFailed, WeftError
from node.home import Home
from node.identity import keyring
from node.identity.keyring import Identity

if TYPE_CHECKING:
    from merge_core.digest import ModelId
    from merge_core.recipe import Recipe
    from merge_core.simmerge.choosing.outcomes import Outcome
    from merge_core.simmerge.choosing.predictor import Predictor
    from node.catalog.hashes import HashCache
    from node.catalog.shelf import Added, Shelf
    from node.config import Config
    from node.domain.ticket import Ticket
    from node.evaluation import Measuring
    from node.jobs.runner import JobView
    from node.merging.check import Checked
    from node.merging.evolve import Search
    from node.merging.how import How
    from node.merging.known import KnownPlaces
    from node.merging.parents import LocalParents
    from node.provenance.lineage import Lineage
    from node.provenance.verify import Report
    from node.selection.candidate import Candidate
    from node.selection.here import Here

START_SECONDS = 30.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.05
COLLECT_EVERY = 100_000
"""Objects between two looks for cycles, where a merge is all that a process does: they stay to its end."""


def initialise(home: Home, *, now: float) -> Identity:
    """Make the identity and the configuration of a new node; raises LocalError where there is one."""
    from node import config

    identity = keyring.create(home.make().identity, now)
    if not home.config.exists():
        config.save(config.Config(), home.config)
    return identity


def identity(home: Home) -> Identity:
    """Who this node is; raises LocalError naming `weft init` where it is nobody yet."""
    return keyring.load(home.checked().identity)


def identity_if_any(home: Home) -> Identity | None:
    """Who this node is, None before `weft init`; a damaged identity still raises LocalError."""
    return keyring.load(home.checked().identity) if home.identity.exists() else None


def ensure_initialised(home: Home) -> None:
    """Make the identity of a new node unless there is one."""
    if not home.identity.exists():
        initialise(home, now=time.time())


def node_runs(home: Home) -> bool:
    """Whether a node runs for this home."""
    from node.control import running

    return running.find(home) is not None


def announce_if_running(home: Home) -> bool:
    """Let a running node tell its peers what lies on the shelf now; False when none runs."""
    from node.control.client import ControlClient

    if not node_runs(home):
        return False
    with ControlClient.connect(home) as node:
        node.announce()
    return True


def serve(home: Home, settings: Config, *, on_up: Callable[[], None]) -> None:
    """Run the node in this process until it is asked to stop."""
    from node import daemon

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)-7s %(name)s  %(message)s")
    logging.getLogger("node").setLevel(logging.INFO)
    asyncio.run(daemon.serve(home, settings, on_up=on_up))


def start_detached(home: Home, settings: Config) -> None:
    """Run the node in its own process, return once it answers; raises LocalError with its last words."""
    from node.control import running

    if node_runs(home):
        raise LocalError(f"a node runs already for {home.root}", hint="weft status")
    identity(home)
    home.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with home.log.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "node.cli", "up", *_flags(settings)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "WEFT_HOME": str(home.root)},
        )
    deadline = time.monotonic() + START_SECONDS
    # Until the child has read what a killed node left, that names an address at which nobody answers.
    while (found := running.find(home)) is None or found.pid != child.pid:
        if child.poll() is not None or time.monotonic() > deadline:
            words = home.log.read_text(errors="replace").strip().splitlines()
            why = next(
                (w for w in reversed(words) if w.startswith("error:")), words[-1] if words else "no word"
            )
            hint = next(
                (w.removeprefix("next:").strip() for w in reversed(words) if w.startswith("next:")), ""
            )
            raise LocalError(
                f"the node did not start: {why.removeprefix('error:').strip()}",
                hint=hint or f"cat {home.log}",
            )
        time.sleep(POLL_SECONDS)


def stop(home: Home) -> None:
    """Ask the node to stop and wait until it has; raises NodeNotRunning, or LocalError when it does not."""
    from node.control import running
    from node.control.client import ControlClient

    pid = running.require(home).pid
    try:
        with ControlClient.connect(home) as node:
            node.shutdown()
    except VerificationFailed:  # the token file was changed: a signal asks as gracefully
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while not running.ended(home):
        if time.monotonic() > deadline:
            raise LocalError(f"the node (pid {pid}) does not stop", hint=f"kill {pid}")
        time.sleep(POLL_SECONDS)


def join(home: Home, text: str) -> Ticket:
    """Join the network of a ticket: now where a node runs, else at its next start."""
    from node import config
    from node.control.client import ControlClient
    from node.domain.ticket import Ticket

    try:
        ticket = Ticket.parse(text)
    except ValueError as error:
        raise UsageError(f"not a ticket: {error}", hint="ask the other node for: weft invite") from error
    if node_runs(home):
        with ControlClient.connect(home) as node:
            node.join(text)
    else:
        config.remember(home.config, ticket)
    return ticket


def _flags(settings: Config) -> list[str]:
    """The settings as flags of `weft up`."""
    flags = ["--network", settings.network, "--peer-api", settings.peer_api]
    flags += ["--control-api", settings.control_api, "--probes", settings.probes]
    for name in ("listen", "announce", "bootstrap"):
        flags += [word for value in getattr(settings, name) for word in (f"--{name}", value)]
    return flags


def hashes(home: Home) -> HashCache:
    """What was hashed before on this machine."""
    from node.catalog.hashes import HashCache

    return HashCache(home.make().cache / "hashes")


def shelf(home: Home) -> Shelf:
    """The experts that this node holds."""
    from node.catalog.shelf import Shelf

    return Shelf(home.experts, hashes=hashes(home))


def add(
    home: Home,
    directory: Path,
    *,
    name: str | None,
    licence: str | None,
    base: str | None = None,
    probes: str | None = None,
    on_progress: Callable[[int], None],
) -> Added:
    """Share a checkpoint: hash, sign and fingerprint it, with or without a running node.

    `base` is what it was trained from, a directory or a model on the shelf; `probes` a built-in set or a
    file, else what the settings say.
    """
    from node import config
    from node.catalog.sketching import sketch_in_worker

    return shelf(home).add(
        directory,
        identity=identity(home),
        sketch=partial(sketch_in_worker, probes=_probes(probes or config.load(home.config).probes)),
        base=None if base is None else model_here(home, base),
        now=time.time(),
        name=name,
        licence=licence,
        on_progress=on_progress,
    )


def model_here(home: Home, reference: str) -> ModelId:
    """The id of a model: as it is given, or of a directory here, or of a name on the shelf."""
    from merge_core.digest import ModelId
    from node.merging.parents import local_parent
    from node.merging.references import LocalDirectory, Published, parse_reference

    found = parse_reference(reference, Path.cwd())
    if isinstance(found, Published):
        return ModelId(found.model_id)
    if isinstance(found, LocalDirectory):
        return local_parent(reference, found.path, hashes(home), None).model_id
    return shelf(home).resolve(found.name).model_id


def candidates(
    home: Home,
    references: Sequence[str],
    *,
    base: str | None = None,
    probes: str | None = None,
    silent: Callable[[Path, str], None] = lambda directory, why: None,
) -> tuple[list[Candidate], Candidate | None]:
    """Models as far as their fingerprints tell, and what they were trained from; the node asks peers.

    Without `base` it is what all of them name, None where that is nowhere to be had. Raises NodeNotRunning
    where a model is not here and no node runs, and what else keeps a model from being compared.
    """
    from node.selection.candidate import base_of, expect_different

    here = _here(home, probes, silent)
    found = _found(home, here, references)
    expect_different(found)
    named = base or base_of(found)
    if named is None:
        return found, None
    try:
        return found, _found(home, here, [named])[0]
    except WeftError:
        if base is not None:
            raise
        return found, None


def _here(home: Home, probes: str | None, silent: Callable[[Path, str], None]) -> Here:
    from merge_core.simmerge.functional.probes import find
    from node import config
    from node.catalog.sketching import sketch_in_worker
    from node.selection.here import Here

    asked = _probes(probes or config.load(home.config).probes)
    return Here(
        shelf=shelf(home),
        hashes=hashes(home),
        folder=home.measured,
        probes=find(asked),
        sketch=partial(sketch_in_worker, probes=asked),
        silent=silent,
    )


def _found(home: Home, here: Here, references: Sequence[str]) -> list[Candidate]:
    """Models by reference: here, else from the node."""
    from node.control.client import ControlClient

    missing = [reference for reference in dict.fromkeys(references) if not here.has(reference, Path.cwd())]
    if missing and not node_runs(home):
        raise NodeNotRunning(f"{missing[0]} is not on this machine", hint="weft up -d, then again")
    found = {name: here.find(name, Path.cwd()) for name in references if name not in missing}
    if missing:
        with ControlClient.connect(home) as node:
            answers = node.candidates(missing)
        found |= {name: _candidate(message) for name, message in zip(missing, answers, strict=True)}
    return [candidate for name in references if (candidate := found[name]) is not None]


def partners(
    home: Home,
    reference: str,
    count: int,
    *,
    base: str | None = None,
    probes: str | None = None,
) -> tuple[Candidate, Candidate | None, list[Candidate], int, int]:
    """The model, its base, the advertised ones nearest to it, how many were compared, and bytes moved."""
    from merge_core.simmerge.mini import Mini
    from node.control.client import ControlClient

    (mine,), known = candidates(home, [reference], base=base, probes=probes)
    sketches = [Mini.of(one.fingerprint).to_bytes() if one else b"" for one in (mine, known)]
    with ControlClient.connect(home) as node:
        answers = node.partners(sketches[0], count, base=sketches[1])
    compared = max((answer.compared for answer in answers), default=0)
    moved = max((answer.moved for answer in answers), default=0)
    return mine, known, [_candidate(answer.candidate) for answer in answers], compared, moved


def predictor(path: Path | None) -> Predictor:
    """What was learned of merges: in a file, else what ships. Raises CorruptCheckpoint, LocalError."""
    from merge_core.checkpoint.published import read_bounded
    from merge_core.simmerge.choosing import predictor as learned

    if path is None:
        return learned.default()
    try:
        return learned.Predictor.parse(read_bounded(path, learned.MAX_PREDICTOR))
    except OSError as error:
        raise LocalError(f"{path} cannot be read: {error.strerror}", hint=f"ls -l {path}") from error


def informed(home: Home, predictor: Predictor) -> tuple[Predictor, int]:
    """The predictor, corrected by the outcomes that a running node knows, and how many those are."""
    from merge_core.simmerge.choosing.outcomes import Outcome
    from node.control.client import ControlClient
    from node.domain.ids import PeerId
    from node.selection.informed import Informed
    from node.selection.outcomes import Told, learned

    if not node_runs(home):
        return predictor, 0
    with ControlClient.connect(home) as node:
        told = [
            Told(author=PeerId(r.author), outcome=Outcome.parse(r.outcome), refuted=r.judged == "refuted")
            for r in node.outcomes()
        ]
    bandit, heard = learned(predictor, told)
    return (Informed.by(predictor, bandit), heard) if heard else (predictor, 0)


def outcome(
    home: Home,
    directory: Path,
    tasks: Sequence[str],
    predictor: Predictor,
    *,
    on_event: Callable[[dict[str, Any]], None],
) -> list[Outcome]:
    """Measure what a merge of two experts is worth, and have the running node tell its peers.

    Raises NodeNotRunning, CorruptCheckpoint where the directory is no merge, and Unmergeable where nothing
    can be learned from it.
    """
    from merge_core.checkpoint.published import PLAN_FILE, read_bounded
    from merge_core.plan import MAX_PLAN, MergePlan
    from node.control.client import ControlClient
    from node.evaluation import Measuring
    from node.selection import outcomes

    try:
        plan = MergePlan.parse(read_bounded(directory / PLAN_FILE, MAX_PLAN))
    except OSError as error:
        raise LocalError(
            f"{directory} is no merge: it has no plan", hint="weft merge RECIPE -o DIR"
        ) from error
    outcomes.operator_of(plan)
    experts = outcomes.experts_of(plan)
    base = None if plan.base is None or len(plan.inputs) == 2 else str(plan.inputs[plan.base])
    with ControlClient.connect(home) as node:
        (first, second), known = candidates(home, experts, base=base)
        told = evaluate(home, {"merged": directory}, Measuring(tasks=tuple(tasks)), on_event=on_event)
        found = outcomes.measured(plan, (first, second), known, predictor, told["tasks"])
        for each in found:
            node.record_outcome(each.to_bytes())
    return found


def _candidate(message: Any) -> Candidate:
    """A model as the node told of it."""
    from merge_core.digest import Digest, ModelId
    from merge_core.simmerge.fingerprint import Fingerprint
    from node.selection.candidate import Candidate

    return Candidate(
        reference=message.model_id,
        name=message.name,
        fingerprint=Fingerprint.parse(message.fingerprint),
        base=ModelId(message.base) if message.base else None,
        author=Digest(message.author),
        moved=message.moved,
    )


def _probes(reference: str) -> str:
    """A probe set as a worker finds it, wherever that stands; raises InvalidTask."""
    from merge_core.simmerge.functional import probes

    probes.find(reference)
    return str(Path(reference).absolute()) if reference.endswith(".jsonl") else reference


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file, its directories spelled absolutely from where the user stands."""
    from merge_core import recipe
    from node.merging.references import absolute

    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise LocalError(f"the recipe {path} cannot be read: {why}", hint="weft merge --help") from error
    return absolute(recipe.parse(text), Path.cwd())


def needs_no_node(home: Home, recipe: Recipe) -> bool:
    """Whether every model of the recipe lies on this machine.

    Raises NotEnoughPeers where one is a hub id that was not downloaded and no node runs that might know it.
    """
    from node.merging.references import is_local, refuse_undownloaded

    if is_local(recipe, Path.cwd()):
        return True
    if not node_runs(home):
        refuse_undownloaded(recipe, Path.cwd())
    return False


def how(*, threads: int | None, max_memory: int | None, perplexity: Path | None) -> How:
    """How to merge, as flags say it; raises MergeCoreError where a text cannot be read as one."""
    from merge_core.report import read_text
    from node.merging.how import How

    if perplexity is not None:
        read_text(perplexity)
    text = "" if perplexity is None else str(perplexity.absolute())
    return How(threads=threads, max_memory=max_memory, perplexity=text)


def check_here(home: Home, recipe: Recipe) -> Checked:
    """What stands against a merge and what it takes, from headers on this machine alone."""
    from node.merging.check import examine

    known = known_places(home).find if home.root.is_dir() else lambda model_id: None
    return examine(recipe, Path.cwd(), known)


def known_places(home: Home) -> KnownPlaces:
    """Where models were seen on this machine."""
    from node.merging.known import KnownPlaces

    held = shelf(home)

    def on_shelf(model_id: ModelId) -> Path | None:
        expert = held.find(model_id)
        return expert.directory if expert else None

    return KnownPlaces(home.cache / "known", on_shelf)


def local_parents(home: Home) -> LocalParents:
    """The models on this machine as parents of a merge."""
    from node.merging.parents import LocalParents

    return LocalParents(hashes(home), known_places(home), Path.cwd())


def plan_here(home: Home, recipe: Recipe) -> dict[str, Any]:
    """Resolve a recipe whose models all lie here; the same data as the control API's."""
    from node.control import views
    from node.merging.merge import Merging
    from node.wire.view import to_data

    gc.set_threshold(COLLECT_EVERY)
    return to_data(views.plan(asyncio.run(Merging(local_parents(home), None, clock=time.time).plan(recipe))))


def merge_here(
    home: Home,
    recipe: Recipe,
    directory: Path,
    *,
    how: How | None = None,
    resume: bool,
    on_view: Callable[[JobView], None],
) -> dict[str, Any]:
    """Merge models that all lie here, without a node; signed where there is an identity."""
    from node.worker import process

    gc.set_threshold(COLLECT_EVERY)
    target = directory.absolute()

    async def work() -> dict[str, Any]:
        async with process.started("merge") as worker:  # which takes as long to load as we to make the plan
            from node.merging import local
            from node.merging.merge import Merging

            parents, identity, known = local_parents(home), identity_if_any(home), known_places(home)
            merging = Merging(parents, identity, clock=time.time, known=known, run=worker.run)
            return await local.merge(
                merging, recipe, target, how=how, resume=resume, clock=time.time, on_view=on_view
            )

    return asyncio.run(work())


def evolve_here(
    home: Home,
    recipe: Recipe,
    directory: Path,
    search: Search,
    *,
    resume: bool,
    on_view: Callable[[JobView], None],
    on_settle: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Search for coefficients of models that all lie here, and merge by them, without a node.

    Ctrl-C settles for the best, where something was found: `on_settle` is told.
    """
    from node.merging import local
    from node.merging.merge import Merging

    merging = Merging(local_parents(home), identity_if_any(home), clock=time.time, known=known_places(home))
    target, can_settle = directory.absolute(), False

    def watch(view: JobView) -> None:
        nonlocal can_settle
        can_settle = view.job.can_settle
        on_view(view)

    def work(*, resume: bool, settle: bool) -> dict[str, Any]:
        return asyncio.run(
            local.evolve(
                merging,
                recipe,
                target,
                search,
                resume=resume,
                settle=settle,
                clock=time.time,
                on_view=watch,
            )
        )

    try:
        return work(resume=resume, settle=False)
    except KeyboardInterrupt:
        if not can_settle:
            raise
    on_settle()
    return work(resume=True, settle=True)


def verify(
    directory: Path, publisher: Path | None, *, on_progress: Callable[[int], None] | None = None
) -> Report:
    """Check everything that a directory says about itself; `publisher` is a PEM file to pin."""
    from node.identity.keys import PublicPublisherKey
    from node.provenance.verify import verify as check

    key = None
    if publisher is not None:
        try:
            key = PublicPublisherKey.from_pem(publisher.read_bytes())
        except (OSError, ValueError) as error:
            raise LocalError(
                f"{publisher} is not a P-256 public key in PEM: {error}", hint="weft id show prints one"
            ) from error
    return check(directory, publisher=key, now=time.time(), on_progress=on_progress)


def with_verdicts(home: Home, report: Report) -> Report:
    """The report with what earlier audits on this machine found; the last one of each auditor."""
    from node.provenance.audit import claims_about
    from node.provenance.verify import Check

    if report.model_id is None or not home.claims.exists():
        return report
    last = {claim.verdict.auditor: claim.verdict for claim in claims_about(home.claims, report.model_id)}
    for auditor, verdict in last.items():
        detail = f"{verdict.checked} leaves computed again, {verdict.failed} differ; signed by {auditor}"
        report = report.and_check(Check(name="verdict", ok=verdict.passed, detail=detail))
    return report


def audit_here(
    home: Home, directory: Path, parents: Sequence[Path], *, on_view: Callable[[JobView], None]
) -> dict[str, Any]:
    """Execute a merge again from parents on this machine; raises NotEnoughPeers where one is missing."""
    from node.merging import local
    from node.merging.audit import Auditing
    from node.merging.parents import local_parent

    known = known_places(home)
    for path in parents:
        known.remember(local_parent(str(path), path.absolute(), hashes(home), None).model_id, path.absolute())
    auditing = Auditing(
        local_parents(home),
        identity_if_any(home),
        claims=home.claims,
        clock=time.time,
    )
    return asyncio.run(local.audit(auditing, directory.absolute(), clock=time.time, on_view=on_view))


def lineage(home: Home, directory: Path) -> Lineage:
    """Follow a model to its roots, through directories on this machine."""
    from node.provenance.lineage import lineage as follow

    return follow(directory, known_places(home).find)


def zoo_folder(seed: int) -> Path:
    """Where the demo's models of a seed are kept: those of another version, recipe or torch lie elsewhere."""
    from merge_core.digest import sha256
    from merge_core.zoo.recipes import origin

    made_from = sha256(json.dumps(origin(seed, "demo"), sort_keys=True).encode())
    return Path(platformdirs.user_cache_dir("weft")) / "zoo" / f"demo-{seed}-{made_from.hex[:16]}"


def zoo(seed: int, *, on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The demo's base and experts: {base, experts}; trained once on a machine, then taken from its cache."""
    from node.worker import process

    folder = zoo_folder(seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    request = {"directory": str(folder), "seed": seed, "size": "demo"}
    return asyncio.run(process.run("zoo", request, on_event=on_event))


def evaluate(
    home: Home,
    models: dict[str, Path],
    how: Measuring,
    *,
    attest: bool = False,
    output: Path | None = None,
    on_event: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Score models side by side, as `node.evaluation` says; `attest` signs the scores as this node's.

    They lie in `output` as JSON before anything is attached, and again with what was.
    """
    from node import evaluation

    attesting = None
    if attest:
        attesting = evaluation.Attesting(identity=identity(home), hashes=hashes(home), now=time.time())

    def keep(data: dict[str, Any]) -> None:
        if output is not None:
            write(output, json.dumps(data, indent=2) + "\n")

    data = asyncio.run(evaluation.evaluate(models, how, attesting=attesting, on_event=on_event, keep=keep))
    keep(data)
    return data


def expect_writable(path: Path) -> None:
    """Raise LocalError where a file cannot be written, before the work whose result it takes."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise LocalError(f"{path} cannot be written", hint=f"ls -ld {folder}")


def write(path: Path, text: str) -> None:
    """Put text into a file of the person's, at once."""
    from merge_core import files

    files.replace(path.absolute(), text.encode())


def write_settings(home: Home, settings: Config) -> None:
    """Make these the settings of a home."""
    from node import config

    config.save(settings, home.config)
