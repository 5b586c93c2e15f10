"""The predictor: what it learns, what its bytes promise, and the whole numbers that machines agree on."""

import dataclasses

import numpy as np
import pytest

from merge_core.errors import CorruptCheckpoint
from merge_core.simmerge.choosing import chains
from merge_core.simmerge.choosing.predictor import MAX_WIDE, UNIT, Layer, Predictor, default
from merge_core.simmerge.choosing.training import FEW, Cells, Training, train, train_folds
from merge_core.simmerge.functional import probes
from merge_core.simmerge.pairs import features

NAMES = ("cosine", "kl", "noise", "score")
OPERATORS = ("linear", "ties", "sum")
QUICK = Training(members=3, hidden=(16, 8), steps=200, batch=64)


def cells(count: int, seed: int = 0) -> Cells:
    """Where the cosine is high averaging wins, where it is low the sum; how much is up to the divergence."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, len(NAMES))).astype(np.float32)
    gain = 0.2 * np.tanh(values[:, 0]) * (values[:, 1] > 0)
    utility = np.stack([0.5 + gain, np.full(count, 0.5), 0.5 - gain], axis=1)
    return Cells(values=values, missing=np.zeros(values.shape, bool), utility=utility.astype(np.float32))


def learned(of: Cells, **more: object) -> Predictor:
    return train(of, names=NAMES, operators=OPERATORS, provenance={"seeds": [0]}, settings=QUICK, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return learned(cells(400), hidden=((), (3,), (0, 1)))


def test_it_learns_which_operator_wins(predictor: Predictor) -> None:
    unseen = cells(300, seed=1)
    told = predictor.predict(unseen.values, unseen.missing)
    decided = np.abs(unseen.utility[:, 0] - unseen.utility[:, 2]) > 0.1
    right = told.utility.argmax(axis=1) == unseen.utility.argmax(axis=1)
    assert right[decided].mean() > 0.95
    assert told.utility.shape == told.width.shape == (300, 3) and (told.width > 0).all()


def test_little_data_gets_a_ridge_and_more_a_network() -> None:
    few, enough = learned(cells(FEW - 1)), learned(cells(FEW))
    assert [len(few.layers), len(enough.layers)] == [1, 3]
    unseen = cells(300, seed=1)
    ahead = few.predict(unseen.values, unseen.missing).utility
    assert np.corrcoef(ahead[:, 0] - ahead[:, 2], unseen.values[:, 0])[0, 1] > 0.8


@pytest.mark.parametrize("count", [40, 200])
def test_what_a_fold_leaves_out_has_no_say(count: int) -> None:
    known, rows = cells(count), np.arange(count // 2)
    spoiled = dataclasses.replace(known, utility=known.utility.copy(), values=known.values.copy())
    spoiled.utility[count // 2 :], spoiled.values[count // 2 :] = 0.0, 9.0
    told = {"names": NAMES, "operators": OPERATORS, "provenance": {}, "settings": QUICK}
    clean, other = (train_folds(each, [rows], **told)[0] for each in (known, spoiled))  # type: ignore[arg-type]
    assert clean.to_bytes() == other.to_bytes()
    everything = np.arange(count)
    assert train_folds(spoiled, [everything], **told)[0].to_bytes() != clean.to_bytes()  # type: ignore[arg-type]


def test_what_is_missing_may_hold_any_number_and_is_told_apart_from_what_is_average(
    predictor: Predictor,
) -> None:
    known = cells(20, seed=2)
    hidden = known.missing.copy()
    hidden[:, 3] = True
    strange = known.values.copy()
    strange[:, 3] = 1e9
    assert (
        predictor.predict(strange, hidden).members == predictor.predict(known.values, hidden).members
    ).all()
    average = known.values.copy()
    average[:, 3] = predictor.centre[3]
    inputs = [predictor.inputs(each, gone) for each, gone in ((strange, hidden), (average, known.missing))]
    assert (inputs[0][:, :4] == inputs[1][:, :4]).all() and (inputs[0] != inputs[1]).any()
    assert np.abs(predictor.inputs(strange, known.missing)).max() == MAX_WIDE


def test_its_bytes_are_one_spelling(predictor: Predictor) -> None:
    data = predictor.to_bytes()
    parsed = Predictor.parse(data)
    assert parsed.to_bytes() == data and parsed.digest == predictor.digest
    known = cells(20, seed=2)
    assert (
        parsed.predict(known.values, known.missing).members
        == predictor.predict(known.values, known.missing).members
    ).all()
    assert parsed.provenance["cells"] == 400 and parsed.provenance["settings"]["hidden"] == [16, 8]


def test_bytes_from_anybody_are_refused_unless_exact(predictor: Predictor) -> None:
    data = predictor.to_bytes()
    broken = [b"", data[:-1], data + b"\0", data.replace(b'"layers\\":3', b'"layers\\":2')]
    broken += [data.replace(b"cosine", b"cos\\u0069"), data.replace(b"ties", b"sum\\n")]
    for each in broken:
        assert each != data
        with pytest.raises(CorruptCheckpoint):
            Predictor.parse(each)


@pytest.mark.parametrize(
    "change",
    [
        {"spread": np.zeros(4, np.float32)},
        {"centre": np.full(4, np.nan, np.float32)},
        {"flags": ((4,),)},
        {"operators": ("linear", "linear", "sum")},
        {"names": NAMES[:3]},
        {"layers": ()},
        {
            "layers": (
                Layer(weights=np.full((1, 4, 3), np.inf, np.float32), bias=np.zeros((1, 3), np.float32)),
            )
        },
    ],
)
def test_what_does_not_belong_together_is_no_predictor(
    predictor: Predictor, change: dict[str, object]
) -> None:
    with pytest.raises(ValueError):
        dataclasses.replace(predictor, **change)  # type: ignore[arg-type]


def test_what_machines_settle_on_is_the_prediction_in_whole_numbers_however_many_are_asked(
    predictor: Predictor,
) -> None:
    known = cells(12, seed=3)
    settled = predictor.settle(known.values, known.missing)
    told = predictor.predict(known.values, known.missing)
    assert np.abs(settled.utility / UNIT - told.utility).max() < 1e-3
    assert settled.embedding.shape == (12, predictor.embedded) and (settled.embedding[:, -1] == UNIT).all()
    for row in range(12):
        alone = predictor.settle(known.values[row], known.missing[row])
        assert (alone.embedding == settled.embedding[row]).all() and (
            alone.utility == settled.utility[row]
        ).all()


def test_the_predictor_that_ships_reads_the_features_of_today_and_says_where_it_comes_from() -> None:
    shipped = default()
    assert shipped.names == features.NAMES and shipped.operators == chains.OPERATORS
    assert shipped.provenance["catalogue"] == [10, 11] and len(shipped.provenance["models"]) == 40
    assert shipped.provenance["probes"] == probes.find("zoo").digest
    nothing = np.ones(len(shipped.names), bool)
    told = shipped.predict(np.zeros(len(shipped.names)), nothing)
    assert (told.utility > 0).all() and (told.utility < 1).all()
