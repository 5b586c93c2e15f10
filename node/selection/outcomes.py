"""What merges turned out to be worth: outcomes that peers sign, and what this node learns from them.

Every node keeps the same records whatever order they came in (`node.records`), and the bandit's state is a
sum over them: nodes that were told the same have learned the same, to the byte. A measurement is its author's
word. One that this node has made itself, of the same merge at the same items, settles what others say of it
(`settle`); who was wrong by more than chance is left out from then on. `spot` says which to try again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_core.digest import Digest, ModelId, canonical, parse_canonical, sha256
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.plan import MergePlan
from merge_core.simmerge.choosing.bandit import Bandit
from merge_core.simmerge.choosing.outcomes import UNIT, Outcome
from merge_core.simmerge.choosing.predictor import Predictor
from merge_core.simmerge.pairs.features import NAMES
from merge_core.simmerge.pairs.survey import Survey
from node.domain.ids import PeerId
from node.records.book import Judgement, Kind, Record, RecordBook
from node.selection.candidate import Candidate

TOLERANCE = UNIT // 20
"""What two measurements of one merge at the same items may differ by: machines round, items are the same."""


def _read(body: Any) -> Outcome:
    try:
        return Outcome.parse(canonical(body))
    except CorruptCheckpoint as error:
        raise ValueError(error.why) from error


OUTCOMES: Kind[Outcome] = Kind(name="outcomes", read=_read, of_one=256, of_all=4096)


def body(outcome: Outcome) -> Any:
    """An outcome as the body of a record."""
    return parse_canonical(outcome.to_bytes())


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """An outcome, who tells it, and whether this node has measured otherwise."""

    author: PeerId
    outcome: Outcome
    refuted: bool


def heard(book: RecordBook[Outcome]) -> list[Told]:
    """What a node was told."""
    judged = book.judged()
    return [
        Told(author=r.author, outcome=r.value, refuted=judged.get(r.digest) is Judgement.REFUTED)
        for r in book.records()
    ]


def learned(predictor: Predictor, told: Iterable[Told]) -> tuple[Bandit, int]:
    """What outcomes say, and how many count: without those of peers whom this node has caught with one."""
    all_told = list(told)
    wrong = {one.author for one in all_told if one.refuted}
    bandit = Bandit(predictor)
    return bandit, sum(bandit.add(one.author, one.outcome) for one in all_told if one.author not in wrong)


def settle(book: RecordBook[Outcome], own: Outcome) -> None:
    """Hold what others say of a merge against what this node has measured of it."""
    for record in book.records():
        if record.value.claim == own.claim and record.value.digest != own.digest:
            near = abs(record.value.utility - own.utility) <= TOLERANCE
            book.judge(record.digest, Judgement.HOLDS if near else Judgement.REFUTED)


def spot(
    book: RecordBook[Outcome],
    me: PeerId,
    *,
    nonce: bytes,
    here: Callable[[Digest], bool],
    count: int = 1,
) -> Sequence[Record[Outcome]]:
    """Records to try again: others', not judged yet, of two fingerprints whose models are `here`.

    Drawn by a nonce that nobody else knows, so that no author can tell which; of each author one at most.
    """
    judged = book.judged()
    drawn: dict[PeerId, tuple[str, Record[Outcome]]] = {}
    for record in book.records():
        if record.author == me or record.digest in judged or not all(map(here, record.value.pair)):
            continue
        lot = sha256(nonce + record.digest.encode())
        if record.author not in drawn or lot < drawn[record.author][0]:
            drawn[record.author] = (lot, record)
    return [record for _, record in sorted(drawn.values(), key=lambda pair: pair[0])[:count]]


def measured(
    plan: MergePlan,
    pair: tuple[Candidate, Candidate],
    base: Candidate | None,
    predictor: Predictor,
    rows: Sequence[Mapping[str, Any]],
) -> list[Outcome]:
    """The outcomes of a merge of two experts, one for each row of an evaluation of it alone.

    `pair` is in the plan's order. Raises Unmergeable where a row's metric is no share of right answers.
    """
    tasks = [str(row["task"]).partition(":")[0] for row in rows]
    models = [candidate.fingerprint for candidate in pair]
    survey = Survey.of(models, base.fingerprint if base else None, tasks=list(dict.fromkeys(tasks)))
    columns = [NAMES.index(name) for name in predictor.names]
    found = []
    for task, row in zip(tasks, rows, strict=True):
        (utility,) = row["values"]
        if not row["higher_is_better"] or utility is None or not 0 <= utility <= 1:
            raise Unmergeable(
                f"{row['task']} is measured by {row['metric']}, which is no share of right answers",
                hint="weft eval --help; name tasks that are scored by exact match or choice",
            )
        at = survey.tasks.index(task)
        found.append(
            Outcome.of(
                pair=(models[0].digest, models[1].digest),
                operator=operator_of(plan),
                plan=plan.digest,
                task=task,
                items=Digest(row["digest"]),
                values=survey.values[0, 1, at, columns],
                missing=survey.missing[0, 1, at, columns],
                names=predictor.names,
                utility=utility,
            )
        )
    return found


def experts_of(plan: MergePlan) -> tuple[ModelId, ModelId]:
    """The two models that a plan merges, its base apart; raises Unmergeable where they are not two."""
    experts = [m for n, m in enumerate(plan.inputs) if n != plan.base or len(plan.inputs) == 2]
    if len(experts) != 2:
        raise Unmergeable(
            f"a merge of {len(experts)} experts; what is learned from are merges of two",
            hint="weft plan --auto A B -o recipe.yaml",
        )
    return experts[0], experts[1]


def operator_of(plan: MergePlan) -> str:
    """The one operator of a plan; raises Unmergeable where there are several."""
    if len(plan.operators) != 1:
        raise Unmergeable(
            f"a merge by {len(plan.operators)} operators; what is learned from are merges by one",
            hint="weft plan --auto A B -o recipe.yaml",
        )
    return plan.operators[0]
