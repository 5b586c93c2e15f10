"""What a worker can do: TASKS, a table of functions from a request to a result.

Requests and results are small JSON objects; whatever is large (plans, leaf tables, weights) is passed as a
path. Heavy modules are imported inside the task that needs them, so that hashing never pays for torch.

    zoo          {directory, seed, size}                       -> {base, experts: {name: directory}}
    catalogue    {directory, seed, chains?}                    -> {experts: {name: directory}, merges}
    fingerprint  {input, output, probes}                       -> {digest, size, silent}
    merge        {plan, inputs, target, journal, output, threads?}
                 -> {model_id, manifest, leaves, trace, report}
    perplexity   {text, models: [[name, directory]]} -> {text, readings: [{model, bits_per_byte, …}]}
    audit        {plan, trace, inputs, manifest, leaves}
                 -> {checked, failed: [[tensor, leaf]], failures, trace_ok, files_ok}

    evaluate               see `node.worker.evaluation`
    evolve, candidates     see `node.worker.evolution`

An `input` is {directory, manifest, leaves, hashed?}: a checkpoint, the paths of its manifest and leaf table,
and the stamps of files that these are of; `inputs` are in the plan's order. A merge leaves the weights in the
partial folder of `target`, and manifest, leaf table and Trace in the folder `output`: whoever asked adds the
files, signs and commits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_core import files
from merge_core.checkpoint.published import read_bounded
from merge_core.checkpoint.reader import Checkpoint, FileStamp, VerifiedSource
from merge_core.digest import sha256
from merge_core.errors import CorruptCheckpoint, MergeCoreError, Unmergeable
from merge_core.memory import THREADS
from merge_core.plan import MAX_PLAN, MergePlan
from merge_core.trace import MAX_TRACE, Trace
from node.worker.claims import Claims
from node.worker.evaluation import evaluate
from node.worker.messages import Emit

if TYPE_CHECKING:
    from merge_core.execute import Material
    from merge_core.simmerge.functional.behaviour import Behaviour
    from merge_core.simmerge.functional.probes import ProbeSet

_MAX_LISTED = 1_000

Request = dict[str, Any]
Result = dict[str, Any]


def zoo(request: Request, emit: Emit) -> Result:
    """Train the base and the experts of one seed, or find them complete in `directory`."""
    from merge_core.zoo.build import build

    built = build(
        Path(request["directory"]),
        seed=request["seed"],
        size=request.get("size", "demo"),
        on_progress=lambda what, done, total: emit(
            {"kind": "progress", "what": what, "done": done, "total": total}
        ),
    )
    return {"base": str(built.base), "experts": {name: str(path) for name, path in built.experts.items()}}


def catalogue(request: Request, emit: Emit) -> Result:
    """Train the catalogue of one seed and score every merge of two, or find both in `directory`.

    With `chains`, the sample of merges of three and four experts too.
    """
    from merge_core.zoo.catalogue import open_catalogue
    from merge_core.zoo.labels import measure, measure_chains, sampled

    def tell(what: str, done: int, total: int) -> None:
        emit({"kind": "progress", "what": what, "done": done, "total": total})

    opened = open_catalogue(Path(request["directory"]), seed=request["seed"], on_progress=tell)
    labels = measure(opened, on_progress=tell)
    if request.get("chains"):
        measure_chains(opened, sampled(tuple(opened.experts)), on_progress=tell)
    experts = {name: str(listed.directory) for name, listed in opened.experts.items()}
    return {"experts": experts, "merges": len(labels.merges)}


def fingerprint(request: Request, emit: Emit) -> Result:
    """Measure a checkpoint, every leaf hashed again as it is read, into the file `output`.

    With `probes`, a built-in set or a file, what it says to them is measured too; `silent` tells why not.
    """
    from merge_core.simmerge.fingerprint import Fingerprint
    from merge_core.simmerge.functional import probes
    from merge_core.simmerge.structural.sketcher import compute

    asked = probes.find(request["probes"]) if request["probes"] else None
    claims = Claims(request["input"])
    with _opened(request["input"], claims) as source:
        structure = compute(source, on_progress=_counter(emit, "sketch", claims.manifest.size))
    behaviour, silent = None, ""
    if asked is not None:
        try:
            behaviour = _behaviour(Path(request["input"]["directory"]), asked, emit)
        except MergeCoreError as error:
            silent = error.why.replace(request["input"]["directory"], "it")
    made = Fingerprint(model_id=claims.model_id, structure=structure, behaviour=behaviour)
    data = made.to_bytes()
    files.replace(Path(request["output"]), data)
    return {"digest": made.digest, "size": len(data), "silent": silent}


def _behaviour(directory: Path, asked: ProbeSet, emit: Emit) -> Behaviour:
    """What the model says to probes; raises MergeCoreError where it cannot be run here."""
    if not (directory / "tokenizer.json").is_file():  # seen at once: loading torch takes seconds
        raise Unmergeable("it has no tokenizer.json")
    from merge_core.simmerge.functional.behaviour import Behaviour
    from merge_core.simmerge.functional.probing import observe

    def tell(done: int, total: int) -> None:
        emit({"kind": "progress", "what": "probe", "done": done, "total": total})

    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return Behaviour.of(observe(directory, asked, max_memory=half, on_progress=tell))


def merge(request: Request, emit: Emit) -> Result:
    """Run a plan, or go on where its journal ends.

    Raises CorruptCheckpoint where an input is another model than the plan names.
    """
    from merge_core import execute
    from merge_core.norms import Norms
    from merge_core.report import report

    plan, norms = MergePlan.parse(read_bounded(Path(request["plan"]), MAX_PLAN)), Norms()
    with _inputs(plan, request["inputs"]) as inputs:
        merged = execute.run(
            plan,
            inputs,
            Path(request["target"]),
            journal=Path(request["journal"]),
            threads=request.get("threads", THREADS),
            norms=norms,
            on_progress=_counter(emit, "merge", plan.output_bytes),
        )
    output = Path(request["output"])
    output.mkdir(parents=True, exist_ok=True)
    made = {
        "manifest.json": merged.manifest.to_bytes(),
        "leaves.bin": merged.leaves.to_bytes(),
        "trace.json": merged.trace.to_bytes(),
        "report.json": report(plan, norms).to_bytes(),
    }
    for name, data in made.items():
        files.replace(output / name, data)
    return {
        "model_id": merged.manifest.model_id,
        **{Path(name).stem: str(output / name) for name in made},
    }


def perplexity(request: Request, emit: Emit) -> Result:
    """Let models predict a text; one that cannot is left out, and `text` says why."""
    from merge_core.evaluation.perplexity import predict
    from merge_core.report import read_text

    text = read_text(Path(request["text"]))
    told = f"{len(text.encode())} bytes of text, {sha256(text.encode())}"
    readings = []
    for name, directory in request["models"]:

        def count(done: int, total: int, name: str = name) -> None:
            emit({"kind": "progress", "what": f"predict with {name}", "done": done, "total": total})

        try:
            found = predict(Path(directory), text, on_progress=count)
        except MergeCoreError as error:
            told += f"; not by {name}: {error.why.replace(directory, 'it')}"
            continue
        figures = {"bits_per_byte": found.bits_per_byte, "perplexity": found.perplexity}
        readings.append({"model": name, **figures, "tokens": found.tokens})
    return {"text": told, "readings": readings}


def audit(request: Request, emit: Emit) -> Result:
    """Execute a plan again and compare; `failed` lists at most 1,000 leaves, `failures` counts all."""
    from merge_core import execute

    plan = MergePlan.parse(read_bounded(Path(request["plan"]), MAX_PLAN))
    trace = Trace.parse(plan, read_bounded(Path(request["trace"]), MAX_TRACE))
    claims = Claims(request)
    with _inputs(plan, request["inputs"]) as inputs:
        report = execute.audit(
            plan,
            trace,
            inputs,
            claims.manifest,
            claims.leaves,
            on_progress=_counter(emit, "audit", plan.output_bytes),
        )
    return {
        "checked": report.checked,
        "failed": [list(failure) for failure in report.failed[:_MAX_LISTED]],
        "failures": len(report.failed),
        "trace_ok": report.trace_ok,
        "files_ok": report.files_ok,
    }


@contextmanager
def _inputs(plan: MergePlan, described: Sequence[Request]) -> Iterator[list[Material]]:
    """The plan's inputs; raises CorruptCheckpoint where one, or a file of it, is not what the plan names."""
    from merge_core.execute import Material

    if len(described) != len(plan.inputs):
        raise CorruptCheckpoint(f"{len(described)} inputs for a plan of {len(plan.inputs)}")
    with ExitStack() as stack:
        materials = []
        for wanted, item in zip(plan.inputs, described, strict=True):
            claims = Claims(item)
            if claims.model_id != wanted:
                raise CorruptCheckpoint(f"the plan names {wanted}; its input is {claims.model_id}")
            source = stack.enter_context(_opened(item, claims))
            materials.append(Material(tensors=source, files=partial(claims.files, Path(item["directory"]))))
        yield materials


@contextmanager
def _opened(described: Request, claims: Claims) -> Iterator[VerifiedSource]:
    """An input's verified bytes; raises CorruptCheckpoint where they do not fit the claims."""
    with Checkpoint.open(Path(described["directory"])) as checkpoint:
        hashed = [FileStamp(*stamp) for stamp in described.get("hashed", ())]
        yield VerifiedSource(checkpoint, claims, hashed=hashed)


def _counter(emit: Emit, what: str, total: int) -> Callable[[int], None]:
    """A callback that adds up bytes and says how far they are, at most a hundred times."""
    done = said = 0

    def count(more: int) -> None:
        nonlocal done, said
        done += more
        if done - said >= total // 100 or done >= total:
            said = done
            emit({"kind": "progress", "what": what, "done": done, "total": total})

    return count


def evolve(request: Request, emit: Emit) -> Result:
    """Search for the coefficients of a merge."""
    from node.worker import evolution

    return evolution.evolve(request, emit)


def candidates(request: Request, emit: Emit) -> Result:
    """Evaluate candidates of a search, one after the other."""
    from node.worker import evolution

    return evolution.candidates(request, emit)


def load(task: str) -> None:
    """Do what a task needs before it can begin, while whoever started the worker makes the request."""
    if task in ("merge", "audit"):
        from merge_core import execute

        execute.load()


TASKS: dict[str, Callable[[Request, Emit], Result]] = {
    "zoo": zoo,
    "catalogue": catalogue,
    "evaluate": evaluate,
    "fingerprint": fingerprint,
    "merge": merge,
    "perplexity": perplexity,
    "audit": audit,
    "evolve": evolve,
    "candidates": candidates,
}
