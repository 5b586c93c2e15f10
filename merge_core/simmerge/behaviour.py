"""The Behaviour: what a model would say next at the positions of a probe set, and what it makes of them inside.

    Behaviour.of(observation)       from what `probing` measured
    Behaviour.read(described, arrays)

Of the next-token distribution at each position the TOP most likely tokens with their log-probabilities, the
mass of all others together, and the entropy; of each layer's hidden states and attention maps a seeded count
sketch. It is a measurement: another machine, or another batch, moves logits by roundings of float32 (some
1e-5), and what is stored is rounded to float16 (relative 2^-11), so a log-probability is good to 0.01.

Two behaviours can be compared where `key` is equal: the same probes, spelled in the same tokens, of the same
vocabulary. No model is needed to compare, and none of numpy's neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_core.digest import Digest, canonical, sha256

TOP = 10
"""Tokens of a distribution that are published one by one."""

Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """Everything that a model was seen to do, as long as it is in memory: exact, and large.

    P positions in the order of the probes, V tokens, T tasks, L layers of width d.
    """

    probes: Digest
    tokenizer: Digest
    """Of the vocabulary: every token and its id."""
    asked: Digest
    """Of the ids of every probe, and where its text begins."""
    tasks: tuple[str, ...]
    task: npt.NDArray[np.uint8]
    """[P]: which of `tasks` a position belongs to."""
    logp: Float32
    """[P, V]: natural logarithms of the next token's probabilities."""
    bits_per_byte: Float32
    """[T]: of the probes' texts; NaN where a task has none that can be spelled."""
    hidden: Float32
    """[L + 1, P, d]: the embeddings, then what each layer hands on."""
    attention: Float32
    """[L, P, heads, keys]: where a position looks, rows that sum to 1; of no layers where it is not known."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Behaviour:
    """What is published of an Observation at no more than 512 positions; one that exists is sound."""

    probes: Digest
    tokenizer: Digest
    asked: Digest
    vocabulary: int
    tasks: tuple[str, ...]
    task: npt.NDArray[np.uint8]
    """[P]."""
    ids: npt.NDArray[np.uint32]
    """[P, K], K = min(TOP, vocabulary): most likely first, of equals the lower id."""
    logp: Float16
    """[P, K]: natural logarithms, not increasing."""
    rest: Float16
    """[P]: logarithm of the mass of all other tokens."""
    entropy: Float16
    """[P]: of the whole distribution, in nats."""
    bits_per_byte: Float32
    """[T]."""
    hidden: Float16
    """[L + 1, w]: sketch of the hidden states of all positions as one vector of length 1."""
    hidden_norm: Float32
    """[L + 1]: root mean square of the hidden states."""
    attention: Float16
    """[L, w]: sketch of the attention maps of all heads as one vector of length 1; of no layers where missing."""

    @cached_property
    def key(self) -> Digest:
        """Equal where two behaviours can be compared."""
        told = [self.probes, self.tokenizer, self.asked, self.vocabulary, len(self.task)]
        return sha256(canonical(told))

    @classmethod
    def of(cls, observation: Observation) -> Behaviour:
        """Summarise what was seen."""
        raise NotImplementedError

    def described(self) -> Any:
        """What goes into canonical JSON; `arrays` hold the rest."""
        raise NotImplementedError

    def arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """The numbers, by name."""
        raise NotImplementedError

    @classmethod
    def read(cls, described: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> Behaviour:
        """The inverse of `described` and `arrays`; raises ValueError on whatever is not exact."""
        raise NotImplementedError
