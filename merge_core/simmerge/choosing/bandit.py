"""The Bandit: what nodes learn from each other's outcomes: LinUCB on a predictor's embedding (neural-linear).

    bandit = Bandit(predictor)
    bandit.add("peer-a", outcome); bandit.add("peer-b", another)     # any order, any number of times
    bandit.judge(values, missing, ("ties", "linear"))                # scores with what is not known yet added

For every operator `A = λI + Σ φφᵀ` and `b = Σ φr`, where φ is the embedding of a pair at a task and r what
the predictor was wrong by. A new operator begins with A = λI and b = 0, which is to say as good as the others
on average; a new task is a new φ. Everything that is summed is a whole number, so the state depends neither
on the order nor on the machine.

Nobody has to be believed: of one peer the answers to one question count once, and all that it says counts for
no more than `Settings.most` answers.
Li et al., arXiv:1003.0146; Riquelme et al., arXiv:1802.09127.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_core.digest import Digest, canonical, sha256
from merge_core.simmerge import container
from merge_core.simmerge.choosing import outcomes
from merge_core.simmerge.choosing.outcomes import Outcome, digest_of
from merge_core.simmerge.choosing.predictor import UNIT, Predictor

Integers = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

_VERSION = 1
_METADATA = "bandit"
_SHARE = 1 << 10
"""What a peer's answers weigh is a whole number of 1/_SHARE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What nodes that compare their states have to agree on."""

    prior: int = 4
    """λ: how many answers the predictor itself counts for."""
    most: int = 64
    """Answers that one peer counts for at most."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judgement:
    """For each operator that was asked about: float64[..., operators]."""

    operators: tuple[str, ...]
    utility: Doubles
    """The predictor's, corrected."""
    width: Doubles
    """√(φᵀA⁻¹φ): 0 where everything is known."""

    def optimistic(self, courage: float) -> Doubles:
        """What LinUCB maximises."""
        return self.utility + courage * self.width


@dataclass(frozen=True, slots=True, eq=False)
class _Answer:
    """A record as far as the state needs it: φ int64[embedded], and r, both in 1/UNIT."""

    digest: Digest
    operator: str
    embedding: Integers
    error: int


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """Of all answers about one operator: int64[embedded, embedded] and int64[embedded], exact."""

    a: Integers
    b: Integers


class Bandit:
    """The state that a set of records gives."""

    def __init__(self, predictor: Predictor, settings: Settings = Settings()) -> None:
        self._predictor = predictor
        self._settings = settings
        self._names = digest_of(predictor.names)
        self._said: dict[str, dict[Digest, _Answer]] = {}
        self._sums: dict[str, _Sums] | None = None

    def add(self, peer: str, outcome: Outcome) -> bool:
        """Take in what a peer says; whether the state changed.

        Of different answers of one peer to one question the one of the least digest counts. What was
        measured with other features says nothing to this predictor.
        """
        if outcome.names != self._names:
            return False
        said = self._said.setdefault(peer, {})
        known = said.get(outcome.claim)
        if known is not None and known.digest <= outcome.digest:
            return False
        settled = self._predictor.settle(*outcome.vector)
        measured = outcome.utility * UNIT // outcomes.UNIT
        said[outcome.claim] = _Answer(
            outcome.digest,
            outcome.operator,
            settled.embedding,
            measured - self._expected(settled.utility, outcome.operator),
        )
        self._sums = None
        return True

    def judge(
        self, values: npt.NDArray[Any], missing: npt.NDArray[np.bool_], operators: Sequence[str]
    ) -> Judgement:
        """What is to be expected of operators, known to the predictor or not, for features [..., m]."""
        settled, sums = self._predictor.settle(values, missing), self._state()
        embedding = settled.embedding / UNIT
        utility, width = [], []
        for operator in operators:
            inverse, b = self._solved(sums.get(operator))
            expected = self._expected(settled.utility, operator) / UNIT
            utility.append(expected + embedding @ (inverse @ b))
            width.append(np.sqrt(np.maximum(((embedding @ inverse) * embedding).sum(axis=-1), 0.0)))
        return Judgement(
            operators=tuple(operators), utility=np.stack(utility, axis=-1), width=np.stack(width, axis=-1)
        )

    def to_bytes(self) -> bytes:
        """The state: equal bytes for equal sets of records, whatever their order and number."""
        sums = self._state()
        told = {
            "version": _VERSION,
            "predictor": self._predictor.digest,
            "prior": self._settings.prior,
            "most": self._settings.most,
            "operators": sorted(sums),
            "records": sha256(canonical(self._records())),
        }
        arrays: dict[str, Integers] = {}
        for number, name in enumerate(sorted(sums)):
            arrays |= {f"a.{number}": sums[name].a, f"b.{number}": sums[name].b}
        return container.write(told, arrays, name=_METADATA)

    def _records(self) -> list[list[str]]:
        return sorted([peer, answer.digest] for peer, said in self._said.items() for answer in said.values())

    def _expected(self, utility: Integers, operator: str) -> Any:
        """What the predictor says of an operator; of one that it does not know, the mean of the others."""
        known = self._predictor.operators
        if operator in known:
            return utility[..., known.index(operator)]
        return utility.sum(axis=-1) // len(known)

    def _state(self) -> dict[str, _Sums]:
        if self._sums is None:
            self._sums = self._added()
        return self._sums

    def _added(self) -> dict[str, _Sums]:
        """The sums over peers, each weighed so that it counts for `most` answers at most."""
        found: dict[str, _Sums] = {}
        for said in self._said.values():
            share = _SHARE * min(len(said), self._settings.most) // max(1, len(said))
            by_operator: dict[str, list[_Answer]] = {}
            for answer in said.values():
                by_operator.setdefault(answer.operator, []).append(answer)
            for operator, answers in by_operator.items():
                rows = np.stack([answer.embedding for answer in answers])
                errors = np.array([answer.error for answer in answers], np.int64)
                a, b = share * (rows.T @ rows), share * (rows.T @ errors)
                known = found.get(operator)
                found[operator] = _Sums(known.a + a, known.b + b) if known else _Sums(a, b)
        return found

    def _solved(self, sums: _Sums | None) -> tuple[Doubles, Doubles]:
        """A⁻¹ and b, as numbers."""
        width, scale = self._predictor.embedded, float(UNIT * UNIT * _SHARE)
        known = sums or _Sums(np.zeros((width, width), np.int64), np.zeros(width, np.int64))
        inverse = np.linalg.inv(self._settings.prior * np.eye(width) + known.a / scale)
        return inverse.astype(np.float64), (known.b / scale).astype(np.float64)
