"""Probing: a model reads a probe set, and what it does is written down as an Observation.

    observation = observe(Path("expert"), probes.find("general"), max_memory=8 << 30)
    Behaviour.of(observation)

Texts are cut into windows of at most 128 tokens, padded on the right, where no causal model looks; the model
runs in float32 on the CPU. A probe in characters that the tokenizer lacks is left out, for all models with
that tokenizer alike. This is the only module of simmerge that runs models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from merge_core.checkpoint.reader import Checkpoint
from merge_core.digest import Digest, canonical, sha256
from merge_core.errors import Unmergeable
from merge_core.evaluation.loading import load_model, load_tokenizer
from merge_core.evaluation.prediction import Asked, Predictor, Progress, windows
from merge_core.evaluation.spelling import Spelled, Speller
from merge_core.simmerge.functional.behaviour import FLOOR, Observation
from merge_core.simmerge.functional.probes import MAX_POSITIONS, ProbeSet

WINDOW = 128
"""Tokens that a model sees at once."""

_BATCH = 1 << 25
"""Numbers that a batch makes, unless one row alone makes more."""
_HELD = 4
"""How often a batch is in memory while it is worked on."""
_PROCESS = 512 << 20


def observe(
    directory: Path,
    probes: ProbeSet,
    *,
    positions: int | None = MAX_POSITIONS,
    max_memory: int | None = None,
    on_progress: Progress = lambda done, total: None,
) -> Observation:
    """Run the model in a directory on a probe set, at no more than `positions` of it (None: at all).

    `on_progress` gets (tokens predicted, tokens). Raises Unmergeable where the model or its tokenizer cannot
    be opened as data, where it would take more than `max_memory` bytes, where no probe can be spelled, and
    where the model computes no numbers; CorruptCheckpoint where it is damaged.
    """
    weights = _size(directory)
    _expect_room(weights, max_memory)
    tokenizer = load_tokenizer(directory)
    reading = _Reading.of(load_model(directory), tokenizer, probes, positions)
    _expect_room(weights + reading.bytes, max_memory)
    return reading.observation(probes, on_progress)


def observe_model(model: Any, tokenizer: Tokenizer, probes: ProbeSet) -> Observation:
    """The same of a causal language model in memory, in eval mode, at every position of the set."""
    return _Reading.of(model, tokenizer, probes, None).observation(probes, lambda done, total: None)


def vocabulary_digest(tokenizer: Tokenizer) -> Digest:
    """Of every token and its id, in the order of ids."""
    known = tokenizer.get_vocab(with_added_tokens=True)
    return sha256(canonical(sorted([number, token] for token, number in known.items())))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """Tokens that are read at once, the probe that they are of, and where its predictions are to go.

    `wanted` are indices of tokens whose distributions are kept, `rows` where in the Observation.
    """

    asked: Asked
    probe: int
    wanted: tuple[int, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """How much a model says of one token: `layers` attention maps of `heads`, and one hidden state more."""

    vocabulary: int
    hidden: int
    width: int
    layers: int
    heads: int

    def numbers(self, keys: int) -> int:
        """Numbers for a token among `keys`."""
        return self.vocabulary + self.hidden * self.width + self.layers * self.heads * keys


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """A model with the windows that it is to read, and room for what it says."""

    model: Any
    tokenizer: Digest
    spelled: Sequence[Spelled | None]
    windows: Sequence[_Window]
    shape: _Shape
    keys: int

    @classmethod
    def of(cls, model: Any, tokenizer: Tokenizer, probes: ProbeSet, positions: int | None) -> _Reading:
        """Spell the probes for a model; raises Unmergeable where none can be."""
        predictor = Predictor(model=model, batch_size=1)
        spelled = _spelled(Speller(tokenizer, model, predictor.vocabulary), probes)
        cut = _cut(spelled, min(WINDOW, predictor.context or WINDOW), positions)
        return cls(
            model=model,
            tokenizer=vocabulary_digest(tokenizer),
            spelled=spelled,
            windows=cut,
            shape=_shape(model),
            keys=max(len(window.asked.ids) for window in cut),
        )

    @property
    def positions(self) -> int:
        """How many distributions are kept."""
        return sum(len(window.rows) for window in self.windows)

    @property
    def bytes(self) -> int:
        """What is kept and what is in work take, in bytes."""
        numbers = self.shape.numbers(self.keys)
        return 4 * (2 * self.positions * numbers + _HELD * max(_BATCH, self.keys * numbers))

    def observation(self, probes: ProbeSet, on_progress: Progress) -> Observation:
        """Let the model read."""
        kept = _Kept.room(self.positions, self.shape, self.keys)
        nats = np.zeros(len(self.spelled))
        done, total = 0, sum(window.asked.count for window in self.windows)
        for batch in self._batches():
            for window, loss in zip(batch, _read(self.model, batch, kept), strict=True):
                nats[window.probe] += loss
            done += sum(window.asked.count for window in batch)
            on_progress(done, total)
        if not (np.isfinite(nats).all() and np.isfinite(kept.hidden).all()):
            raise Unmergeable("the model finds a token impossible, or computes no numbers")
        owner = np.array([window.probe for window in self.windows for _ in window.rows])
        index = {task: number for number, task in enumerate(probes.tasks)}
        of_probe = np.array([index[probe.task] for probe in probes.probes], dtype=np.uint8)
        return Observation(
            probes=probes.digest,
            tokenizer=self.tokenizer,
            asked=self._digest(),
            tasks=probes.tasks,
            task=of_probe[owner],
            logp=kept.logp,
            bits_per_byte=self._bits_per_byte(nats, of_probe, len(probes.tasks)),
            hidden=kept.hidden,
            attention=kept.attention,
        )

    def _batches(self) -> Iterator[list[_Window]]:
        """Windows, the longest first, as many at once as there is room for."""
        batch: list[_Window] = []
        for window in sorted(self.windows, key=lambda one: -len(one.asked.ids)):
            keys = len((batch or [window])[0].asked.ids)
            if batch and (len(batch) + 1) * keys * self.shape.numbers(keys) > _BATCH:
                yield batch
                batch = []
            batch.append(window)
        yield batch

    def _digest(self) -> Digest:
        listed = [[one.asked.ids, one.asked.start, one.probe, list(one.wanted)] for one in self.windows]
        return sha256(canonical(listed))

    def _bits_per_byte(
        self, nats: npt.NDArray[np.float64], of_probe: npt.NDArray[np.uint8], tasks: int
    ) -> npt.NDArray[np.float32]:
        sizes = np.array([one.bytes if one else 0 for one in self.spelled], dtype=np.float64)
        lost = np.bincount(of_probe, weights=nats, minlength=tasks)
        read = np.bincount(of_probe, weights=sizes, minlength=tasks)
        with np.errstate(invalid="ignore"):
            return (lost / read / math.log(2)).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """The arrays of an Observation while they are filled."""

    logp: npt.NDArray[np.float32]
    hidden: npt.NDArray[np.float32]
    attention: npt.NDArray[np.float32]

    @classmethod
    def room(cls, positions: int, shape: _Shape, keys: int) -> _Kept:
        return cls(
            logp=np.zeros((positions, shape.vocabulary), np.float32),
            hidden=np.zeros((shape.hidden, positions, shape.width), np.float32),
            attention=np.zeros((shape.layers, positions, shape.heads, keys), np.float32),
        )


@torch.inference_mode()
def _read(model: Any, batch: Sequence[_Window], kept: _Kept) -> list[float]:
    """Read windows, the longest first, and keep what is wanted; return the nats of each."""
    keys = len(batch[0].asked.ids)
    ids = torch.zeros(len(batch), keys, dtype=torch.long)
    for number, window in enumerate(batch):
        ids[number, : len(window.asked.ids)] = torch.tensor(window.asked.ids)
    told = model(
        input_ids=ids, use_cache=False, output_hidden_states=True, output_attentions=len(kept.attention) > 0
    )
    logits = told.logits.float()
    rows = np.array([row for window in batch for row in window.rows], dtype=np.int64)
    wanted = [(number, at - 1) for number, window in enumerate(batch) for at in window.wanted]
    if wanted:
        which, at = (torch.tensor(side) for side in zip(*wanted, strict=True))
        kept.logp[rows] = logits[which, at].log_softmax(-1).clamp(min=FLOOR).numpy()
        for layer in range(len(kept.hidden)):
            kept.hidden[layer, rows] = told.hidden_states[layer][which, at].float().numpy()
        for layer in range(len(kept.attention)):
            kept.attention[layer, rows, :, :keys] = told.attentions[layer][which, :, at].float().numpy()
    return [_nats(logits[number], window.asked) for number, window in enumerate(batch)]


def _nats(logits: Tensor, asked: Asked) -> float:
    """What the tokens from `start` on cost, in nats."""
    length = len(asked.ids)
    wanted = torch.tensor(asked.ids[asked.start :])
    return float(cross_entropy(logits[asked.start - 1 : length - 1], wanted, reduction="sum"))


def _spelled(speller: Speller, probes: ProbeSet) -> list[Spelled | None]:
    """Each probe in tokens, None where the tokenizer lacks some; raises Unmergeable where all are None."""
    found: list[Spelled | None] = []
    why: Unmergeable | None = None
    for probe in probes.probes:
        try:
            found += speller.texts([(probe.prompt, probe.text)])
        except Unmergeable as error:
            why = error
            found.append(None)
    if why is not None and not any(found):
        raise Unmergeable(
            f"no probe of {probes.name} can be spelled: {why.why}",
            hint="probes in characters that the tokenizer knows: --probes FILE.jsonl",
        ) from why
    return found


def _cut(spelled: Sequence[Spelled | None], size: int, positions: int | None) -> list[_Window]:
    """The windows of all probes in order, with the positions that are kept of each."""
    counts = [one.asked.count if one else 0 for one in spelled]
    kept = counts if positions is None else _allotted(counts, positions)
    found: list[_Window] = []
    row = 0
    for probe, (one, count, share) in enumerate(zip(spelled, counts, kept, strict=True)):
        if one is None:
            continue
        # Spread over the text; a probe that has more positions than its share leaves out every so many.
        chosen = {number * count // share for number in range(share)}
        seen = 0
        for asked in windows(one.asked, size):
            wanted = tuple(
                at for at in range(asked.start, len(asked.ids)) if seen + at - asked.start in chosen
            )
            seen += asked.count
            rows = tuple(range(row, row + len(wanted)))
            found.append(_Window(asked=asked, probe=probe, wanted=wanted, rows=rows))
            row += len(wanted)
    return found


def _allotted(counts: Sequence[int], limit: int) -> list[int]:
    """A share for each, at most `limit` together: as even as the counts allow, first come first."""
    level = max(range(limit + 1), key=lambda n: (sum(min(n, count) for count in counts) <= limit, n))
    shares = [min(level, count) for count in counts]
    left = limit - sum(shares)
    for index, count in enumerate(counts):
        if left and shares[index] < count:
            shares[index] += 1
            left -= 1
    return shares


@torch.inference_mode()
def _shape(model: Any) -> _Shape:
    """What the model tells of a token, found out with one; attention maps only where all layers have them."""
    try:
        model.set_attn_implementation("eager")  # the others never make the maps
        told = model(
            input_ids=torch.zeros(1, 2, dtype=torch.long),
            use_cache=False,
            output_hidden_states=True,
            output_attentions=True,
        )
        maps = list(getattr(told, "attentions", None) or [])
    except (AttributeError, TypeError, ValueError, RuntimeError):
        maps = []
        told = model(
            input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False, output_hidden_states=True
        )
    if len({one.shape if isinstance(one, Tensor) else None for one in maps}) != 1 or maps[0].ndim != 4:
        maps = []
    states = list(getattr(told, "hidden_states", None) or [])
    states = states if len({one.shape for one in states}) == 1 else []
    return _Shape(
        vocabulary=told.logits.shape[-1],
        hidden=len(states),
        width=states[0].shape[-1] if states else 0,
        layers=len(maps),
        heads=maps[0].shape[1] if maps else 0,
    )


def _size(directory: Path) -> int:
    """Bytes of the weights in float32, and of the largest tensor once more."""
    with Checkpoint.open(directory) as checkpoint:
        sizes = [4 * math.prod(info.shape) for info in checkpoint.tensors.values()]
    return sum(sizes) + max(sizes, default=0)


def _expect_room(needed: int, limit: int | None) -> None:
    if limit is not None and _PROCESS + needed > limit:
        raise Unmergeable(
            f"running the model takes {_PROCESS + needed >> 20} MiB, and {limit >> 20} MiB are allowed",
            hint="add it on a machine with more memory: a fingerprint is good for every holder",
        )
