"""What to merge, how and in which order, told from fingerprints: `weft plan --auto`.

The chains are those of merge_core.simmerge.choosing.plans; here they get the names that people know,
recipes that anybody can run, and the words that go with them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merge_core import recipe as recipes
from merge_core.errors import Unmergeable
from merge_core.simmerge.choosing.chains import Chain
from merge_core.simmerge.choosing.forecast import Scored
from merge_core.simmerge.choosing.plans import Advice, advise
from merge_core.simmerge.choosing.predictor import Predictor
from node.domain import text
from node.selection.candidate import Candidate

BASELESS = ("linear", "slerp")
"""Operators that need no base."""
ANY = "any"
"""What a task is called where no probes tell tasks apart."""
MAX_ALTERNATIVES = 10
MAX_REASONS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Auto:
    """What is advised, of which models."""

    candidates: tuple[Candidate, ...]
    base: Candidate | None
    advice: Advice

    @property
    def recipes(self) -> tuple[str, ...]:
        """The recipe of the best chain; and of the second one, where nobody can tell which is better."""
        return tuple(self._recipe(scored) for scored in self.advice.undecided or (self.advice.best,))

    def called(self, chain: Chain) -> str:
        """A chain by the names that people know."""
        names = {candidate.reference: candidate.name for candidate in self.candidates}
        return str(Chain(experts=tuple(names[e] for e in chain.experts), operators=chain.operators))

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        ranked = self.advice.ranked
        return {
            "tasks": list(self.advice.tasks),
            "considered": self.advice.considered,
            "best": self._told(ranked[0]),
            "undecided": bool(self.advice.undecided),
            "alternatives": [self._told(scored) for scored in ranked[1 : 1 + MAX_ALTERNATIVES]],
            "reasons": [
                {"feature": r.feature, "value": r.value, "effect": r.effect}
                for r in self.advice.reasons[:MAX_REASONS]
            ],
            "recipes": list(self.recipes),
        }

    def _told(self, scored: Scored) -> dict[str, Any]:
        by_task = zip(self.advice.tasks, scored.by_task.tolist(), strict=True)
        return {
            "chain": self.called(scored.chain),
            "operators": list(scored.chain.operators),
            "experts": list(scored.chain.experts),
            "utility": scored.utility,
            "width": scored.width(),
            "behind": self.advice.best.utility - scored.utility,
            "by_task": dict(by_task),
        }

    def _recipe(self, scored: Scored) -> str:
        """A recipe for people: what is merged by name, why, and YAML that any node can resolve."""
        base = self.base.reference if self.base else ""
        steps = [
            json.loads(step) for step in scored.chain.recipe(base=base, dtype="float32").split("\n---\n")
        ]
        for step in steps:
            del step["dtype"]  # the models' own
        recipe = recipes.parse("\n---\n".join(map(json.dumps, steps))).to_yaml()
        told = [
            self.called(scored.chain),
            f"predicted {scored.utility:.3f} ± {scored.width():.3f} at {', '.join(self.advice.tasks)},"
            f" the best of {self.advice.considered} by fingerprints alone",
        ]
        known = [*self.candidates, *([self.base] if self.base else [])]
        told += [f"{candidate.reference} is {candidate.name}" for candidate in known]
        return "".join(f"# {text.printable(words)}\n" for words in told) + recipe


def plan(
    candidates: Sequence[Candidate],
    base: Candidate | None,
    predictor: Predictor,
    *,
    tasks: Sequence[str] = (),
    subsets: bool = False,
) -> Auto:
    """Choose operators and order, and with `subsets` which experts to leave out.

    `tasks` are those of the probe set that the merge is to be good at, all where none are named. Raises
    Unmergeable on a task that the models were not asked about, and where there is nothing to choose among.
    """
    advice = advise(
        {candidate.reference: candidate.fingerprint for candidate in candidates},
        base=base.fingerprint if base else None,
        tasks=expect_asked(candidates, tasks),
        predictor=predictor,
        operators=() if base else [name for name in predictor.operators if name in BASELESS],
        least=2 if subsets else None,
    )
    return Auto(candidates=tuple(candidates), base=base, advice=advice)


def best_of(
    mine: Candidate,
    other: Candidate,
    base: Candidate | None,
    predictor: Predictor,
    *,
    tasks: Sequence[str] = (),
) -> dict[str, Any]:
    """What the best merge of two would be, for a table of partners; None where nothing can be told.

    Raises Unmergeable on a task that `mine` was not asked about.
    """
    expect_asked([mine], tasks)
    try:
        best = plan([mine, other], base, predictor, tasks=tasks).advice.best
    except Unmergeable:
        return {"operator": None, "predicted": None, "width": None}
    return {
        "operator": best.chain.operators[0],
        "predicted": best.utility,
        "width": best.width(),
    }


def expect_asked(candidates: Sequence[Candidate], wanted: Sequence[str]) -> tuple[str, ...]:
    """The tasks to be good at, each once; raises Unmergeable on one that not all were asked about."""
    asked = [c.fingerprint.behaviour.tasks for c in candidates if c.fingerprint.behaviour is not None]
    known = [task for task in (asked[0] if asked else ()) if all(task in tasks for tasks in asked)]
    for task in wanted:
        if task not in known:
            told = (
                f"they were asked about {', '.join(known)}" if known else "nothing is known of what they say"
            )
            raise Unmergeable(
                f"nothing tells how these models do at {task!r}: {told}",
                hint="weft add DIR --probes NAME|FILE asks a model",
            )
    return tuple(dict.fromkeys(wanted)) or tuple(known) or (ANY,)
