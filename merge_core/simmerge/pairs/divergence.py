"""Divergence: how differently two models behave, by formulas that whole and listed distributions share.

    measured(a, b, base)          from Observations: whole distributions, and states of every layer

`panel` estimates the same from fingerprints. The pairs' axes come in front, `...` below, none for a single
pair. NaN says that something is not known.

Beside a and b stand the mean of the two and the sum of their task vectors, as if predictions added up like
weights: p_mean ∝ √(p_a p_b), p_sum ∝ p_a p_b / p_base.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merge_core.errors import Unmergeable
from merge_core.simmerge.functional.behaviour import Observation

Floats = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

PAIR = (
    "kl",  # KL(p_a ‖ p_b); logarithms are natural
    "reverse_kl",  # KL(p_b ‖ p_a)
    "js",  # Jensen-Shannon divergence, at most ln 2
    "agreement",  # 1 where both find the same token most likely, else 0
    "mean_from_a",  # KL(p_a ‖ p_mean)
    "mean_from_b",
    "mean_as_a",  # 1 where a's most likely token is the mean's, too, else 0
    "mean_as_b",
    "mean_entropy",
    "sum_from_a",  # KL(p_a ‖ p_sum); this and what follows needs a base
    "sum_from_b",
    "sum_as_a",
    "sum_as_b",
    "sum_entropy",
    "shift_product",  # mean, by p_base, of (ln p_a − ln p_base) (ln p_b − ln p_base)
    "shift_square_a",  # of (ln p_a − ln p_base)²
    "shift_square_b",
)
"""What is known of a pair at each position."""
NEEDS_BASE = PAIR.index("sum_from_a")
"""The first of PAIR that is not known without a base."""
MODEL = (
    "entropy",
    "confidence",  # the largest probability
    "bits_per_byte",  # of the probes' texts
    "to_base",  # KL(p ‖ p_base); this and what follows needs a base
    "from_base",  # KL(p_base ‖ p)
    "base_agreement",  # share of positions where it finds the base's most likely token most likely
)
"""What is known of one model at each task: means over the task's positions."""

_CHUNK = 1 << 21
"""Logarithms that are in work at once of each model."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerStatistics:
    """What goes on inside of two models while they read, by layer; of no layers where it is not known."""

    hidden_cosine: Floats
    """[..., L + 1]: of the hidden states of all positions as one vector, the embeddings first."""
    hidden_task_cosine: Floats
    """[..., L + 1]: of what training changed of them, h_a − h_base and h_b − h_base."""
    hidden_shift_a: Floats
    """[..., L + 1]: ‖h_a − h_base‖ / ‖h_base‖."""
    hidden_shift_b: Floats
    """[..., L + 1]."""
    attention_cosine: Floats
    """[..., L]: of the attention maps of all heads and positions as one vector."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FunctionalStatistics:
    """What the predictions of ordered pairs (a, b) say; with nothing to compare all sizes are 0.

    Where one a is compared with many b, `a` and `base` are without the pairs' axes.
    """

    tasks: tuple[str, ...]
    """T names."""
    counts: npt.NDArray[np.int64]
    """[T]: positions of each task."""
    task: npt.NDArray[np.uint8]
    """[P]: which of `tasks` the positions of `pair` belong to; those of one task may be all."""
    pair: Floats
    """[..., PAIR, P]."""
    a: Floats
    """[..., MODEL, T]."""
    b: Floats
    """[..., MODEL, T]."""
    base: Floats
    """[..., MODEL, T]."""
    layers: LayerStatistics


def nothing(*pairs: int) -> FunctionalStatistics:
    """What is known of pairs that cannot be compared, [*pairs, …]."""

    def empty(*shape: int) -> Floats:
        return np.full((*pairs, *shape), np.nan, np.float32)

    return FunctionalStatistics(
        tasks=(),
        counts=np.zeros(0, np.int64),
        task=np.zeros(0, np.uint8),
        pair=empty(len(PAIR), 0),
        a=empty(len(MODEL), 0),
        b=empty(len(MODEL), 0),
        base=empty(len(MODEL), 0),
        layers=LayerStatistics(
            hidden_cosine=empty(0),
            hidden_task_cosine=empty(0),
            hidden_shift_a=empty(0),
            hidden_shift_b=empty(0),
            attention_cosine=empty(0),
        ),
    )


def measured(a: Observation, b: Observation, base: Observation | None = None) -> FunctionalStatistics:
    """Compare two models at every position; raises Unmergeable where they were not asked the same."""
    if any(other.key != a.key for other in (b, base or b)):
        raise Unmergeable("the models did not read the same probes in the same tokens")
    of_a = _model(a, base)
    return FunctionalStatistics(
        tasks=a.tasks,
        counts=counts(a.task, len(a.tasks)),
        task=a.task,
        pair=_whole(a, b, base),
        a=of_a,
        b=_model(b, base),
        base=np.full_like(of_a, np.nan) if base is None else _model(base, base),
        layers=_layers(a, b, base),
    )


def _layers(a: Observation, b: Observation, base: Observation | None) -> LayerStatistics:
    origin = None if base is None else _flat(base.hidden)
    hidden = compared(Stack.of(_flat(a.hidden), origin), Stack.of(_flat(b.hidden), origin))
    looks = compared(Stack.of(_flat(a.attention), None), Stack.of(_flat(b.attention), None))
    return LayerStatistics(
        hidden_cosine=hidden[0],
        hidden_task_cosine=hidden[1],
        hidden_shift_a=hidden[2],
        hidden_shift_b=hidden[3],
        attention_cosine=looks[0],
    )


def pair_measures(a: Float64, b: Float64, base: Float64 | None, count: Float64) -> Float64:
    """[P, S] logarithms of three models' probabilities of S tokens to [PAIR, P].

    `count` [P, S] or [S] says how many tokens an entry stands for, 0 for none.
    """
    p, q = count * np.exp(a), count * np.exp(b)
    middle = np.log((np.exp(a) + np.exp(b)) / 2)
    found = np.full((len(PAIR), len(a)), np.nan)
    found[0] = (p * (a - b)).sum(1)
    found[1] = (q * (b - a)).sum(1)
    found[2] = (p * (a - middle) + q * (b - middle)).sum(1) / 2
    best_a, best_b = _best(a, count), _best(b, count)
    found[3] = best_a == best_b
    found[4:9] = _combined((a + b) / 2, (a, b), (p, q), (best_a, best_b), count)
    if base is not None:
        z = count * np.exp(base)
        found[9:14] = _combined(a + b - base, (a, b), (p, q), (best_a, best_b), count)
        found[14] = (z * (a - base) * (b - base)).sum(1)
        found[15] = (z * (a - base) ** 2).sum(1)
        found[16] = (z * (b - base) ** 2).sum(1)
    return found


def _combined(
    logs: Float64,
    parents: tuple[Float64, Float64],
    masses: tuple[Float64, Float64],
    best: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
    count: Float64,
) -> list[Float64]:
    """KL of both parents to what is ∝ exp(logs), whether it finds the same most likely, and its entropy."""
    logs = logs - logs.max(1, keepdims=True)
    mass = count * np.exp(logs)
    total = mass.sum(1)
    size = np.log(total)
    kl = [(p * (a - logs)).sum(1) + size * p.sum(1) for a, p in zip(parents, masses, strict=True)]
    most = np.where(count > 0, logs, -np.inf).max(1, keepdims=True)
    kept = [(np.take_along_axis(logs, one[:, None], 1) >= most)[:, 0] for one in best]
    return [*kl, *kept, size - (mass * logs).sum(1) / total]


def _best(logs: Float64, count: Float64) -> npt.NDArray[np.int64]:
    best: npt.NDArray[np.int64] = np.where(count > 0, logs, -np.inf).argmax(1)
    return best


def _whole(a: Observation, b: Observation, base: Observation | None) -> Floats:
    """`pair_measures` of whole distributions, some positions at a time."""
    positions, vocabulary = a.logp.shape
    step = max(1, _CHUNK // vocabulary)
    one = np.ones(vocabulary)
    parts = []
    for start in range(0, positions, step):
        rows = slice(start, start + step)
        logs = [None if o is None else o.logp[rows].astype(np.float64) for o in (a, b, base)]
        assert logs[0] is not None and logs[1] is not None
        parts.append(pair_measures(logs[0], logs[1], logs[2], one))
    return np.concatenate(parts, axis=1).astype(np.float32)


def _model(one: Observation, base: Observation | None) -> Floats:
    """[MODEL, T] of whole distributions."""
    entropy = np.array([-(np.exp(row) * row).sum(dtype=np.float64) for row in one.logp])
    confidence = np.exp(one.logp.max(axis=1))
    pair = _whole(one, base or one, base)
    return model_measures(entropy, confidence, one.bits_per_byte, one.task, pair if base else None)


def model_measures(
    entropy: Float64 | Floats,
    confidence: Float64 | Floats,
    bits_per_byte: Floats,
    task: npt.NDArray[np.uint8],
    with_base: Floats | None,
) -> Floats:
    """[P] each, and [PAIR, P] of the model with the base, to [MODEL, T]; NaN for tasks without positions."""
    unknown = np.full(len(task), np.nan)
    beside = (unknown, unknown, unknown) if with_base is None else (with_base[0], with_base[1], with_base[3])
    tasks = len(bits_per_byte)
    size = counts(task, tasks)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = [
            np.bincount(task, weights=values, minlength=tasks) / size
            for values in (entropy, confidence, *beside)
        ]
    return np.stack([*means[:2], bits_per_byte, *means[2:]]).astype(np.float32)


def counts(task: npt.NDArray[np.uint8], tasks: int) -> npt.NDArray[np.int64]:
    """How many positions each task has."""
    return np.bincount(task, minlength=tasks)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stack:
    """Vectors [..., L, w] of some models by layer, and what each is from the base's, with their lengths."""

    vectors: Floats
    lengths: Floats
    changes: Floats | None
    changed: Floats
    """[..., L]: lengths of `changes`; NaN without a base."""
    base: Floats
    """[L]: lengths of the base's vectors."""

    @classmethod
    def of(cls, vectors: Floats, base: Floats | None) -> Stack:
        """Measure vectors; `base` is [L, w]."""
        lengths = _length(vectors)
        changes = None if base is None else vectors - base
        return cls(
            vectors=vectors,
            lengths=lengths,
            changes=changes,
            changed=np.full_like(lengths, np.nan) if changes is None else _length(changes),
            base=np.full_like(lengths, np.nan) if base is None else _length(base),
        )


def compared(a: Stack, b: Stack) -> list[Floats]:
    """One model a beside b [..., L]: the cosine, that of the changes, and how large both changes are.

    NaN beside a vector of zeros, and without a base.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = _dot(a.vectors, b.vectors) / (a.lengths * b.lengths)
        changes = np.full_like(cosine, np.nan)
        if a.changes is not None and b.changes is not None:
            changes = _dot(a.changes, b.changes) / (a.changed * b.changed)
        shifts = np.broadcast_to(a.changed / a.base, cosine.shape), b.changed / b.base
    return [cosine.clip(-1.0, 1.0), changes.clip(-1.0, 1.0), *shifts]


def _dot(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.einsum("lw,...lw->...l", a, b, optimize=False), np.float32)


def _length(a: Floats) -> Floats:
    return np.asarray(np.sqrt(np.einsum("...w,...w->...", a, a)), np.float32)


def _flat(layers: Floats) -> Floats:
    return layers.reshape(len(layers), -1) if layers.size else layers.reshape(0, 0)
