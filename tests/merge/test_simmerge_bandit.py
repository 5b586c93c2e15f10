"""The bandit: one state for one set of records, corrections that are learned, and liars who are bounded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.digest import sha256
from merge_core.simmerge.choosing.bandit import Bandit, Settings
from merge_core.simmerge.choosing.outcomes import Outcome
from merge_core.simmerge.choosing.predictor import Layer, Predictor

NAMES = ("cosine", "kl")
KNOWN = ("linear", "ties")
PLAN = sha256(b"plan")


def flat() -> Predictor:
    """It embeds a pair as max(cosine, 0), max(-cosine, 0), and finds every operator worth a half."""
    first = np.array([[[1.0, -1.0], [0.0, 0.0]]], np.float32)
    return Predictor(
        names=NAMES,
        operators=KNOWN,
        centre=np.zeros(2, np.float32),
        spread=np.ones(2, np.float32),
        flags=(),
        layers=(
            Layer(weights=first, bias=np.zeros((1, 2), np.float32)),
            Layer(weights=np.zeros((1, 2, 2), np.float32), bias=np.full((1, 2), 0.5, np.float32)),
        ),
        provenance={},
    )


def said(number: int, operator: str, utility: float, cosine: float = 1.0, task: str = "maths") -> Outcome:
    return Outcome.of(
        pair=(sha256(f"a{number}".encode()), sha256(b"b")),
        operator=operator,
        plan=PLAN,
        task=task,
        items=PLAN,
        values=np.array([cosine, 0.0]),
        missing=np.array([False, False]),
        names=NAMES,
        utility=utility,
    )


RECORDS = [
    (
        f"peer-{number % 3}",
        said(number % 7, ("linear", "ties", "new")[number % 3], number / 24, number / 12 - 1),
    )
    for number in range(24)
]


@settings(max_examples=40, deadline=None)
@given(st.permutations(RECORDS), st.lists(st.sampled_from(RECORDS), max_size=20))
def test_any_order_and_any_number_of_copies_give_the_same_bytes(order: list, copies: list) -> None:  # type: ignore[type-arg]
    one, other = Bandit(flat(), Settings(most=4)), Bandit(flat(), Settings(most=4))
    for peer, outcome in RECORDS:
        one.add(peer, outcome)
    for peer, outcome in [*copies, *order, *copies]:
        other.add(peer, outcome)
    assert one.to_bytes() == other.to_bytes()


def test_every_record_that_counts_shows_in_the_bytes() -> None:
    states = set()
    bandit = Bandit(flat())
    for number in range(6):
        assert bandit.add("peer", said(number, "ties", 0.5 + number / 20))
        states.add(bandit.to_bytes())
    assert len(states) == 6
    assert not bandit.add("peer", said(0, "ties", 0.5)) and bandit.to_bytes() in states


def judged(bandit: Bandit, operators: tuple[str, ...], cosine: float = 1.0) -> list[float]:
    told = bandit.judge(np.array([cosine, 0.0]), np.array([False, False]), operators)
    return told.utility.tolist()


def test_what_was_measured_corrects_the_prediction_where_pairs_are_alike() -> None:
    bandit = Bandit(flat())
    for number in range(30):
        bandit.add("peer", said(number, "ties", 0.9))
    ties, linear = judged(bandit, ("ties", "linear"))
    assert ties == pytest.approx(0.9, abs=0.06) and linear == 0.5
    unlike, _ = judged(bandit, ("ties", "linear"), cosine=-1.0)
    assert unlike < ties - 0.1


def test_a_new_operator_is_as_good_as_the_others_until_it_is_known_and_wide() -> None:
    bandit = Bandit(flat())
    for number in range(30):
        bandit.add("peer", said(number, "ties", 0.9))
    told = bandit.judge(np.array([1.0, 0.0]), np.array([False, False]), ("ties", "new"))
    assert told.utility[1] == 0.5 and told.width[1] > 3 * told.width[0]
    assert told.optimistic(2.0).argmax() == 1
    for number in range(30):
        bandit.add("peer", said(number, "new", 0.2))
    assert (
        bandit.judge(np.array([1.0, 0.0]), np.array([False, False]), ("ties", "new")).optimistic(2.0).argmax()
        == 0
    )


def test_a_peer_that_floods_counts_for_no_more_than_its_most() -> None:
    honest, flooded = Bandit(flat(), Settings(most=8)), Bandit(flat(), Settings(most=8))
    for bandit in (honest, flooded):
        for peer in range(10):
            for number in range(8):
                bandit.add(f"honest-{peer}", said(100 * peer + number, "ties", 0.9))
    for number in range(2_000):
        flooded.add("liar", said(10_000 + number, "ties", 0.0))
    (clean,), (spoiled,) = judged(honest, ("ties",)), judged(flooded, ("ties",))
    assert 0 < clean - spoiled < 0.9 / 10


def test_who_answers_one_question_twice_is_counted_once() -> None:
    answers = [said(1, "ties", utility) for utility in (0.1, 0.9, 0.5)]
    states = set()
    for first in range(3):
        bandit = Bandit(flat())
        for outcome in answers[first:] + answers[:first]:
            bandit.add("peer", outcome)
        states.add(bandit.to_bytes())
    alone = Bandit(flat())
    alone.add("peer", min(answers, key=lambda outcome: outcome.digest))
    assert states == {alone.to_bytes()}


def test_features_that_the_predictor_does_not_read_say_nothing_to_it() -> None:
    other = Outcome.of(
        pair=(PLAN, sha256(b"b")),
        operator="ties",
        plan=PLAN,
        task="maths",
        items=PLAN,
        values=np.array([1.0]),
        missing=np.array([False]),
        names=("cosine",),
        utility=1.0,
    )
    bandit = Bandit(flat())
    assert not bandit.add("peer", other) and bandit.to_bytes() == Bandit(flat()).to_bytes()
