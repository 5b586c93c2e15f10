"""Outcomes: nodes that were told the same have learned the same, and who is caught lying counts no more."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from merge_core.digest import Digest, sha256
from merge_core.simmerge.outcomes import Outcome
from merge_core.simmerge.predictor import Layer, Predictor
from node.identity.keys import HostKey
from node.records.book import MAX_RECORD, Judgement, RecordBook
from node.records.book import Outcome as Admitted
from node.selection.outcomes import OUTCOMES, body, doubted, learned, settle, spot
from node.store import Store

NOW = 1_760_000_000.0
KEYS = [HostKey.from_private_bytes(bytes([seed]) * 32) for seed in range(1, 6)]
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


def book(folder: Path) -> RecordBook[Outcome]:
    return RecordBook(Store(folder / "node.db"), OUTCOMES, network="test")


def signed(key: HostKey, told: Outcome, folder: Path, *, at: float = NOW) -> bytes:
    return book(folder / f"{key.peer_id}-{told.digest.hex[:8]}").say(body(told), key, at)


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
        states.add(learned(predictor(), held).to_bytes())
    assert len(states) == 1
    more = book(tmp_path / "order-0")
    more.admit(signed(KEYS[0], outcome(99, pair=99), tmp_path), NOW)
    assert learned(predictor(), more).to_bytes() not in states


def test_who_is_found_to_have_lied_counts_no_more(tmp_path: Path) -> None:
    held = book(tmp_path / "held")
    honest, liar, me = KEYS[:3]
    for n in range(3):
        held.admit(signed(honest, outcome(n, utility=0.80), tmp_path), NOW)
        held.admit(signed(liar, outcome(n, utility=0.10), tmp_path), NOW)
    before = learned(predictor(), held).to_bytes()
    settle(held, outcome(1, utility=0.82))
    judged = {record.author: held.judged().get(record.digest) for record in held.records() if _of(record, 1)}
    assert judged == {honest.peer_id: Judgement.HOLDS, liar.peer_id: Judgement.REFUTED}
    assert doubted(held.records(), held.judged()) == {liar.peer_id}
    after = learned(predictor(), held).to_bytes()
    alone = book(tmp_path / "alone")
    for n in range(3):
        alone.admit(signed(honest, outcome(n, utility=0.80), tmp_path), NOW)
    assert after == learned(predictor(), alone).to_bytes() != before
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
