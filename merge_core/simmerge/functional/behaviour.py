"""The Behaviour: what a model would say next at the positions of a probe set, and what goes on inside.

    Behaviour.of(observation)               from what `probing` measured
    Behaviour.read(described, arrays)       from anybody

Of the next-token distribution at each position the TOP most likely tokens with their log-probabilities, the
mass of all others together, and the entropy; of each layer's hidden states and attention maps a seeded count
sketch (Charikar, Chen, Farach-Colton 2002), by which cosines c are estimated with an error of about
(1 - c²)/√width.

It is a measurement: another machine moves log-probabilities by some 1e-5, and what is stored is rounded to
float16, so one above -16 is good to 0.005. Two behaviours can be compared where `key` is equal: the same
probes in the same tokens of the same vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_core.digest import Digest, canonical, sha256
from merge_core.simmerge.functional.probes import MAX_POSITIONS, MAX_TASKS, is_name

TOP = 10
"""Tokens of a distribution that are published one by one."""
FLOOR = -60.0
"""The least logarithm of a probability that is written down."""
MAX_BEHAVIOUR = 64 << 10
"""Bytes of all arrays together."""

_HIDDEN_BYTES, _ATTENTION_BYTES = 20 << 10, 8 << 10
_WIDTHS = tuple(1 << n for n in range(10, 3, -1))
_MAX_LAYERS = 512
_LARGEST_SKETCH = 8.0
"""A bucket of a vector of length 1; an honest one is below 1, but for chance."""
_LARGEST = 1e12
"""Of a hidden state, and of bits per byte: nothing that runs comes near."""
_MASS = 0.01
"""What float16 may move the sum of all probabilities by."""

Array = npt.NDArray[Any]
Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """Everything that a model was seen to do, as long as it is in memory: exact, and large.

    P positions in the order of the probes, V tokens, T tasks, L layers of width d.
    """

    probes: Digest
    tokenizer: Digest
    """Of the vocabulary: every token and its id."""
    asked: Digest
    """Of the tokens of every probe, and of the positions that are kept."""
    tasks: tuple[str, ...]
    task: npt.NDArray[np.uint8]
    """[P]: which of `tasks` a position belongs to."""
    logp: Float32
    """[P, V]: natural logarithms of the next token's probabilities, from FLOOR on."""
    bits_per_byte: Float32
    """[T]: of the probes' texts; NaN where a task has none that can be spelled."""
    hidden: Float32
    """[L + 1, P, d]: the embeddings, then what each layer hands on; of no layers where it is not known."""
    attention: Float32
    """[L, P, heads, keys]: where a position looks, rows that sum to 1; of no layers where it is not known."""

    @cached_property
    def key(self) -> Digest:
        """Equal where two observations can be compared."""
        return _key(self.probes, self.tokenizer, self.asked, self.logp.shape[1])


@dataclass(frozen=True, kw_only=True, eq=False)
class Behaviour:
    """What is published of an Observation at no more than 512 positions; raises ValueError on nonsense."""

    probes: Digest
    tokenizer: Digest
    asked: Digest
    vocabulary: int
    tasks: tuple[str, ...]
    task: npt.NDArray[np.uint8]
    """[P]."""
    ids: npt.NDArray[np.uint32]
    """[P, K], K = min(TOP, vocabulary): most likely first, of equals the lower id; distinct."""
    logp: Float16
    """[P, K]: natural logarithms, not increasing."""
    rest: Float16
    """[P]: logarithm of the mass of all other tokens."""
    entropy: Float16
    """[P]: of the whole distribution, in nats."""
    bits_per_byte: Float32
    """[T]."""
    hidden: Float16
    """[L + 1, w]: sketch of the hidden states of all positions as one vector, divided by its length."""
    hidden_norm: Float32
    """[L + 1]: root mean square of the hidden states."""
    attention: Float16
    """[L, w]: sketch of the attention maps of all heads as one vector, divided by its length."""

    def __post_init__(self) -> None:
        why = _problem(self)
        if why:
            raise ValueError(f"behaviour: {why}")

    @cached_property
    def key(self) -> Digest:
        """Equal where two behaviours can be compared."""
        return _key(self.probes, self.tokenizer, self.asked, self.vocabulary)

    @classmethod
    def of(cls, seen: Observation) -> Behaviour:
        """Summarise what was seen."""
        vocabulary = seen.logp.shape[1]
        ids, rest, entropy = zip(*(_summary(row, min(TOP, vocabulary)) for row in seen.logp), strict=True)
        top = np.stack(ids)
        hidden = _sketched("hidden", seen.hidden, _HIDDEN_BYTES)
        squares = [np.square(layer).mean(dtype=np.float64) for layer in seen.hidden[: len(hidden)]]
        return cls(
            probes=seen.probes,
            tokenizer=seen.tokenizer,
            asked=seen.asked,
            vocabulary=vocabulary,
            tasks=seen.tasks,
            task=seen.task,
            ids=top.astype(np.uint32),
            logp=np.take_along_axis(seen.logp, top, axis=1).astype(np.float16),
            rest=np.array(rest, np.float16),
            entropy=np.array(entropy, np.float16),
            bits_per_byte=seen.bits_per_byte,
            hidden=hidden,
            hidden_norm=np.sqrt(squares).astype(np.float32),
            attention=_sketched("attention", seen.attention, _ATTENTION_BYTES),
        )

    def described(self) -> Any:
        """What goes into canonical JSON; `arrays` hold the rest."""
        return {
            "probes": self.probes,
            "tokenizer": self.tokenizer,
            "asked": self.asked,
            "vocabulary": self.vocabulary,
            "tasks": list(self.tasks),
        }

    def arrays(self) -> Mapping[str, Array]:
        """The numbers, by name; those of no layers are left out."""
        held: dict[str, Array] = {name: getattr(self, name) for name in _DTYPES}
        return {name: array for name, array in held.items() if array.size}

    @classmethod
    def read(cls, described: Any, arrays: Mapping[str, Array]) -> Behaviour:
        """The inverse of `described` and `arrays`; raises ValueError on whatever is not exact."""
        if not isinstance(described, dict) or set(described) != _DESCRIBED:
            raise ValueError("behaviour: keys")
        if set(arrays) - set(_DTYPES) or not set(arrays) >= set(_DTYPES) - _OF_LAYERS:
            raise ValueError("behaviour: arrays")
        if not isinstance(described["tasks"], list) or type(described["vocabulary"]) is not int:
            raise ValueError("behaviour: types")
        absent = {name: np.zeros((0,) * rank, _DTYPES[name]) for name, rank in _RANKS.items()}
        return cls(
            probes=Digest(described["probes"]),
            tokenizer=Digest(described["tokenizer"]),
            asked=Digest(described["asked"]),
            vocabulary=described["vocabulary"],
            tasks=tuple(described["tasks"]),
            **{name: arrays.get(name, absent[name]) for name in _DTYPES},
        )


_DESCRIBED = {"probes", "tokenizer", "asked", "vocabulary", "tasks"}
_DTYPES: Mapping[str, Any] = {
    "task": np.uint8,
    "ids": np.uint32,
    "logp": np.float16,
    "rest": np.float16,
    "entropy": np.float16,
    "bits_per_byte": np.float32,
    "hidden": np.float16,
    "hidden_norm": np.float32,
    "attention": np.float16,
}
_RANKS = {name: 2 if name in ("ids", "logp", "hidden", "attention") else 1 for name in _DTYPES}
_OF_LAYERS = {"hidden", "hidden_norm", "attention"}


def _key(probes: Digest, tokenizer: Digest, asked: Digest, vocabulary: int) -> Digest:
    return sha256(canonical([probes, tokenizer, asked, vocabulary]))


def _summary(logp: Float32, count: int) -> tuple[npt.NDArray[np.int64], float, float]:
    """Ids of the most likely, of equals the lower first; the logarithm of all others' mass; the entropy."""
    least = np.partition(logp, len(logp) - count)[len(logp) - count]
    among = np.flatnonzero(logp >= least)
    top = among[np.argsort(-logp[among], kind="stable")][:count]
    mass = np.exp(logp.astype(np.float64))
    entropy = -float((mass * logp).sum())
    mass[top] = 0.0
    others = float(mass.sum())
    return top, max(math.log(others), FLOOR) if others else FLOOR, max(entropy, 0.0)


def _sketched(what: str, layers: Float32, budget: int) -> Float16:
    """[L, …] to float16[L, w]: each layer divided by its length, as wide as the budget allows."""
    count = len(layers)
    width = next((w for w in _WIDTHS if 2 * count * w <= budget), 0)
    if not layers.size or not width:
        return np.zeros((0, 0), np.float16)
    buckets, signs = _hashes(what, layers[0].size)
    found = np.zeros((count, width))
    for sketch, layer in zip(found, layers.reshape(count, -1), strict=True):
        length = np.sqrt(np.square(layer).sum(dtype=np.float64)) or 1.0
        sketch[:] = np.bincount(buckets & (width - 1), weights=layer * signs, minlength=width) / length
    return found.astype(np.float16)


@lru_cache(maxsize=2)
def _hashes(what: str, size: int) -> tuple[npt.NDArray[np.uint16], Float32]:
    """A bucket and a sign for each coordinate, the same for all models and layers."""
    drawn = hashlib.shake_128(f"weft behaviour v1 {what}".encode()).digest(2 * size)
    bits = np.frombuffer(drawn, dtype="<u2")
    return bits & np.uint16(0x7FFF), np.where(bits & 0x8000, 1.0, -1.0).astype(np.float32)


def _problem(found: Behaviour) -> str | None:
    """Why arrays cannot be a Behaviour; None where they can."""
    for name, dtype in _DTYPES.items():
        array = getattr(found, name)
        if array.dtype != dtype or array.ndim != _RANKS[name]:
            return f"type of {name}"
    if sum(getattr(found, name).nbytes for name in _DTYPES) > MAX_BEHAVIOUR:
        return f"more than {MAX_BEHAVIOUR} bytes"
    return _problem_of_tasks(found) or _problem_of_predictions(found) or _problem_of_layers(found)


def _problem_of_tasks(found: Behaviour) -> str | None:
    if not 1 <= len(found.tasks) <= MAX_TASKS or len(set(found.tasks)) != len(found.tasks):
        return "tasks"
    if not all(isinstance(task, str) and is_name(task) for task in found.tasks):
        return "names of tasks"
    if not 1 <= len(found.task) <= MAX_POSITIONS or int(found.task.max()) >= len(found.tasks):
        return "positions"
    bits = found.bits_per_byte
    if bits.shape != (len(found.tasks),) or (bits > _LARGEST).any() or (bits < 0).any():
        return "bits per byte"
    return None


def _problem_of_predictions(found: Behaviour) -> str | None:
    positions, vocabulary = len(found.task), found.vocabulary
    if not 2 <= vocabulary < 1 << 32:
        return "vocabulary"
    shape = (positions, min(TOP, vocabulary))
    if found.ids.shape != shape or found.logp.shape != shape:
        return "shape of the distributions"
    if found.rest.shape != (positions,) or found.entropy.shape != (positions,):
        return "shape of rest or entropy"
    in_order = np.sort(found.ids, axis=1)
    if int(in_order.max()) >= vocabulary or (in_order[:, 1:] == in_order[:, :-1]).any():
        return "tokens"
    logs = np.column_stack([found.logp, found.rest]).astype(np.float64)
    if not (np.isfinite(logs).all() and (logs >= FLOOR).all() and (logs <= 0).all()):
        return "logarithms of probabilities"
    if (np.diff(logs[:, :-1], axis=1) > 0).any() or (abs(np.exp(logs).sum(axis=1) - 1) > _MASS).any():
        return "probabilities"
    entropy = found.entropy.astype(np.float64)
    if not ((entropy >= 0) & (entropy <= np.log(vocabulary) + _MASS)).all():  # not true of NaN either
        return "entropies"
    return None


def _problem_of_layers(found: Behaviour) -> str | None:
    states, norms = len(found.hidden), found.hidden_norm
    if norms.shape != (states,) or not ((norms >= 0) & (norms <= _LARGEST)).all():
        return "norms of hidden states"
    for name in ("hidden", "attention"):
        sketch = getattr(found, name)
        if sketch.size and (sketch.shape[1] not in _WIDTHS or len(sketch) > _MAX_LAYERS):
            return f"shape of {name}"
        if not (abs(sketch) <= _LARGEST_SKETCH).all():
            return f"sketch of {name}"
    return None
