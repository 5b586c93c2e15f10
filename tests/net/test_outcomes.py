"""Outcomes: nodes that were told the same have learned the same, and who is caught lying counts no more."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merge_core.checkpoint.reader import Checkpoint, VerifiedSource, measure
from merge_core.digest import Digest, sha256
from merge_core.errors import Unmergeable
from merge_core.simmerge.choosing.bandit import Bandit
from merge_core.simmerge.choosing.outcomes import UNIT, Outcome, digest_of
from merge_core.simmerge.choosing.predictor import Layer, Predictor
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.structural.sketcher import compute
from node.identity.keys import HostKey
from node.records.book import MAX_RECORD, Judgement, RecordBook
from node.records.book import Outcome as Admitted
from node.selection.candidate import Candidate
from node.selection.informed import MOST, Informed
from node.selection.outcomes import (
    OUTCOMES,
    body,
    experts_of,
    heard,
    learned,
    measured,
    operator_of,
    settle,
    spot,
)
from node.store import Store

NOW = 1_760_000_000.0
KEYS = [HostKey.from_private_bytes(bytes([seed]) * 32) for seed in range(1, 6)]
ME = HostKey.from_private_bytes(bytes([99]) * 32)
NAMES = tuple(f"feature {number}" for number in range(90))
OPERATORS = ("ties", "linear", "brand new")


def predictor() -> Predictor:
    draw = np.random.default_rng(1)
    return Predictor(
        names=NAMES,
        operators=("ties", "linear"),
        centre=np.zeros(90, np.float32),
        spread=np.ones(90, np.float32),
        flags=(),
        layers=(
            Layer(
                weights=draw.standard_normal((1, 90, 6)).astype(np.float32), bias=np.zeros((1, 6), np.float32)
            ),
            Layer(
                weights=draw.standard_normal((1, 6, 2)).astype(np.float32), bias=np.zeros((1, 2), np.float32)
            ),
        ),
        provenance={"of": "a test"},
    )


def outcome(number: int, *, utility: float = 0.5, operator: str = "ties", pair: int = 0) -> Outcome:
    draw = np.random.default_rng(number)
    return Outcome.of(
        pair=(sha256(f"a{pair}".encode()), sha256(f"b{pair}".encode())),
        operator=operator,
        plan=sha256(f"plan{number}".encode()),
        task="maths",
        items=sha256(f"items{number}".encode()),
        values=draw.standard_normal(90),
        missing=np.zeros(90, bool),
        names=NAMES,
        utility=utility,
    )


def book(folder: Path, me: HostKey = ME) -> RecordBook[Outcome]:
    return RecordBook(Store(folder / "node.db"), OUTCOMES, network="test", me=me.peer_id)


def signed(key: HostKey, told: Outcome, folder: Path, *, at: float = NOW) -> bytes:
    return book(folder / f"{key.peer_id}-{told.digest.hex[:8]}", key).say(body(told), key, at)


def test_two_nodes_that_were_told_the_same_in_any_order_hold_the_same_to_the_byte(tmp_path: Path) -> None:
    draw = random.Random(5)
    told = [
        signed(key, outcome(n, utility=draw.random(), operator=draw.choice(OPERATORS), pair=n), tmp_path)
        for key in KEYS
        for n in range(6)
    ]
    assert max(map(len, told)) < MAX_RECORD
    states = set()
    for turn in range(4):
        order = told + draw.sample(told, 12)  # some come twice
        draw.shuffle(order)
        held = book(tmp_path / f"order-{turn}")
        for data in order:
            held.admit(data, NOW)
        assert len(held.records()) == len(told)
        states.add(state(held))
    assert len(states) == 1
    more = book(tmp_path / "order-0")
    more.admit(signed(KEYS[0], outcome(99, pair=99), tmp_path), NOW)
    assert state(more) not in states


def state(held: RecordBook[Outcome]) -> bytes:
    """What a node has learned from what it was told."""
    return learned(predictor(), heard(held))[0].to_bytes()


def test_who_is_found_to_have_lied_counts_no_more(tmp_path: Path) -> None:
    held = book(tmp_path / "held")
    honest, liar, me = KEYS[:3]
    for n in range(3):
        held.admit(signed(honest, outcome(n, utility=0.80), tmp_path), NOW)
        held.admit(signed(liar, outcome(n, utility=0.10), tmp_path), NOW)
    before = state(held)
    settle(held, outcome(1, utility=0.82))
    judged = {record.author: held.judged().get(record.digest) for record in held.records() if _of(record, 1)}
    assert judged == {honest.peer_id: Judgement.HOLDS, liar.peer_id: Judgement.REFUTED}
    assert {one.author for one in heard(held) if one.refuted} == {liar.peer_id}
    after = state(held)
    alone = book(tmp_path / "alone")
    for n in range(3):
        alone.admit(signed(honest, outcome(n, utility=0.80), tmp_path), NOW)
    assert after == state(alone) != before
    assert me.peer_id not in judged


def _of(record: object, number: int) -> bool:
    return record.value.items == sha256(f"items{number}".encode())  # type: ignore[attr-defined]


def test_nobody_can_tell_which_record_is_tried_again(tmp_path: Path) -> None:
    held = book(tmp_path / "held")
    for n in range(8):
        held.admit(signed(KEYS[0], outcome(n, pair=n), tmp_path), NOW)
    held.admit(signed(KEYS[1], outcome(50, pair=50), tmp_path), NOW)
    me = KEYS[1].peer_id

    def anywhere(fingerprint: Digest) -> bool:
        return True

    drawn = {spot(held, me, nonce=bytes([n]), here=anywhere)[0].digest for n in range(40)}
    assert len(drawn) > 3
    assert all(spot(held, me, nonce=b"n", here=anywhere, count=9)[0].author != me for _ in range(1))
    assert len(spot(held, me, nonce=b"n", here=anywhere, count=9)) == 1, "one of each author"
    assert spot(held, me, nonce=b"n", here=lambda fingerprint: False) == []
    for record in held.records():
        held.judge(record.digest, Judgement.HOLDS)
    assert spot(held, me, nonce=b"n", here=anywhere) == []


@pytest.mark.parametrize("change", [{"utility": 70000}, {"values": [1.5]}, {"pair": ["x", "y"]}, {"more": 1}])
def test_an_outcome_that_cannot_be_is_no_record(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        book(tmp_path / "liar").say(body(outcome(1)) | change, KEYS[0], NOW)
    held = book(tmp_path / "held")
    assert held.admit(b'{"payload":"","payloadType":"x","signatures":[]}', NOW) is Admitted.MALFORMED


def candidate(name: str, directory: Path) -> Candidate:
    with Checkpoint.open(directory) as checkpoint:
        found = measure(checkpoint)
        structure = compute(VerifiedSource(checkpoint, found.leaves))
    fingerprint = Fingerprint(model_id=found.manifest.model_id, structure=structure, behaviour=None)
    return Candidate(reference=str(directory), name=name, fingerprint=fingerprint)


def learner() -> Predictor:
    """Reads one feature, and thinks the same of every operator."""
    return Predictor(
        names=("task_cosine",),
        operators=("linear", "ties"),
        centre=np.zeros(1, np.float32),
        spread=np.ones(1, np.float32),
        flags=(),
        layers=(Layer(weights=np.zeros((2, 1, 2), np.float32), bias=np.full((2, 2), 0.5, np.float32)),),
        provenance={"of": "a test"},
    )


def row(**changes: object) -> dict[str, object]:
    told = {"task": "maths:dev", "metric": "exact_match", "higher_is_better": True, "values": [0.75]}
    return told | {"digest": sha256(b"items")} | changes


def test_a_merge_of_two_experts_is_told_with_the_features_that_it_was_planned_by(family: Any) -> None:
    found = {name: candidate(name, path) for name, path in family.parents.items()}
    assert operator_of(family.plan) == "ties"
    assert experts_of(family.plan) == (found["math"].model_id, found["code"].model_id)
    pair = (found["math"], found["code"])
    (told,) = measured(family.plan, pair, found["base"], learner(), [row()])
    assert (told.task, told.operator, told.plan) == ("maths", "ties", family.plan.digest)
    assert told.utility / UNIT == 0.75 and told.pair == tuple(c.fingerprint.digest for c in pair)
    (cosine,), (missing,) = told.vector
    assert not missing and abs(cosine) < 1
    (unknown,) = measured(family.plan, pair, None, learner(), [row()])
    assert unknown.values == (None,)
    for change in ({"higher_is_better": False, "metric": "nats"}, {"values": [None]}, {"values": [40.0]}):
        with pytest.raises(Unmergeable, match="share of right answers"):
            measured(family.plan, pair, found["base"], learner(), [row(**change)])


def test_what_was_heard_corrects_a_prediction_and_silence_does_not(family: Any) -> None:
    found = {name: candidate(name, path) for name, path in family.parents.items()}
    pair, learned = (found["math"], found["code"]), learner()
    values, missing = np.array([0.1]), np.array([False])
    assert np.array_equal(
        Informed.by(learned, Bandit(learned)).predict(values, missing).members,
        learned.predict(values, missing).members,
    )
    for score, least, most in (
        (0.55, 0.53, 0.55),
        (1.0, 0.5 + MOST, 0.5 + MOST),
        (0.0, 0.5 - MOST, 0.5 - MOST),
    ):
        bandit = Bandit(learned)
        for n in range(30):
            told = measured(
                family.plan, pair, found["base"], learned, [row(values=[score], digest=sha256(bytes([n])))]
            )
            bandit.add(f"peer {n % 3}", told[0])
        linear, ties = Informed.by(learned, bandit).predict(values, missing).utility
        assert linear == pytest.approx(0.5, abs=1e-3) and least - 1e-6 <= ties <= most + 1e-6


@pytest.mark.parametrize("liars", [1, 40])
def test_however_many_names_lie_a_lead_beyond_what_they_may_move_stays(liars: int) -> None:
    leading = replace(learner(), layers=(replace(learner().layers[0], bias=LEADS),))
    bandit = Bandit(leading)
    for number in range(liars * 20):
        told = outcome(number, utility=number % 2, operator=leading.operators[number % 2], pair=number)
        answer = replace(told, names=digest_of(leading.names), values=(0,))
        bandit.add(f"liar {number % liars}", answer)
    values, missing = np.zeros(1), np.array([False])
    assert bandit.judge(values, missing, leading.operators).utility.argmax() == 1
    linear, ties = Informed.by(leading, bandit).predict(values, missing).utility
    assert (linear, ties) == (pytest.approx(0.75 - MOST), pytest.approx(0.5 + MOST))


LEADS = np.tile(np.array([0.75, 0.5], np.float32), (2, 1))
