"""Outcomes: one spelling, bounds on every number, and a claim that does not depend on the answer."""

import dataclasses
import json

import numpy as np
import pytest

from merge_core.digest import canonical, sha256
from merge_core.errors import CorruptCheckpoint
from merge_core.simmerge.choosing.outcomes import MAX_OUTCOME, MAX_VALUE, UNIT, Outcome, digest_of

A, B, PLAN, ITEMS = (sha256(name) for name in (b"a", b"b", b"plan", b"items"))
NAMES = ("cosine", "kl")


def outcome(**change: object) -> Outcome:
    told = {"pair": (A, B), "operator": "ties", "plan": PLAN, "task": "maths", "items": ITEMS, "names": NAMES}
    told |= {"values": np.array([0.5, 7.0]), "missing": np.array([False, True]), "utility": 0.25}
    return Outcome.of(**(told | change))  # type: ignore[arg-type]


def test_it_says_the_same_after_a_journey() -> None:
    told = outcome()
    assert Outcome.parse(told.to_bytes()) == told
    assert told.values == (UNIT // 2, None) and told.utility == UNIT // 4
    values, missing = told.vector
    assert values.tolist() == [0.5, 0.0] and missing.tolist() == [False, True]


def test_huge_features_are_bounded() -> None:
    told = outcome(values=np.array([1e30, -np.inf]), missing=np.array([False, False]))
    assert told.values == (MAX_VALUE, -MAX_VALUE)


def test_a_claim_is_the_question_alone() -> None:
    told = outcome()
    same = [outcome(utility=0.9), outcome(pair=(B, A)), outcome(values=np.array([0.0, 0.0]))]
    assert {each.claim for each in same} == {told.claim}
    others = [outcome(operator="sce"), outcome(task="law"), outcome(items=PLAN), outcome(pair=(A, PLAN))]
    assert told.claim not in {each.claim for each in others}
    assert len({each.digest for each in [told, *same, *others]}) == 8


def test_names_in_another_order_are_other_features() -> None:
    assert digest_of(NAMES) != digest_of(NAMES[::-1])


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": True},
        {"utility": UNIT + 1},
        {"utility": -1},
        {"utility": True},
        {"utility": "1"},
        {"values": []},
        {"values": [MAX_VALUE + 1]},
        {"values": [True]},
        {"values": [None] * 1025},
        {"pair": [A, A]},
        {"pair": [A]},
        {"pair": [A, "sha256:0"]},
        {"operator": ""},
        {"operator": "a\nb"},
        {"operator": 7},
        {"task": "x" * 121},
        {"more": 1},
    ],
)
def test_what_no_outcome_can_be_is_refused(change: dict[str, object]) -> None:
    told = json.loads(outcome().to_bytes()) | change
    with pytest.raises(CorruptCheckpoint):
        Outcome.parse(canonical(told))


def test_other_spellings_and_floods_are_refused() -> None:
    data = outcome().to_bytes()
    for broken in (b"", data + b" ", data[:-1], data.replace(b":", b": ", 1), b" " * (MAX_OUTCOME + 1)):
        with pytest.raises(CorruptCheckpoint):
            Outcome.parse(broken)
    with pytest.raises(ValueError):
        dataclasses.replace(outcome(), utility=2 * UNIT)
