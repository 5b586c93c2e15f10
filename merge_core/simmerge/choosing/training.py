"""How a predictor is trained: on cells, each a pair of models, a task, and what its merges were worth there.

    predictor = train(cells, names=NAMES, operators=OPERATORS, provenance={…})
    predictors = train_folds(cells, folds, …)          # many at once, for a study that holds models out

Huber loss on the utilities, and for every two operators of a cell a logistic loss on which is the better
one, weighed by how much better it is: a plan is chosen by comparing operators, not by their heights. Members
differ in how they begin and in what they see. Below FEW cells a ridge takes the place of the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import huber_loss, softplus

from merge_core.simmerge.choosing.predictor import MAX_WIDE, Layer, Predictor

FEW = 60
"""Cells below which a ridge is fitted."""

Floats = npt.NDArray[np.float32]
Columns = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cells:
    """`values` float32[n, features], `missing` bool alike; `utility` float32[n, operators], NaN: unknown."""

    values: Floats
    missing: npt.NDArray[np.bool_]
    utility: Floats

    def __getitem__(self, rows: Any) -> Cells:
        return Cells(values=self.values[rows], missing=self.missing[rows], utility=self.utility[rows])

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The settings of a training."""

    members: int = 5
    hidden: tuple[int, ...] = (64, 32)
    steps: int = 400
    batch: int = 256
    rate: float = 3e-3
    decay: float = 1e-2
    delta: float = 0.1
    """Where Huber's loss turns from a square into a line, in utility."""
    ranking: float = 0.3
    """The weight of the pairwise loss."""
    sharpness: float = 20.0
    """What differences of utility are multiplied by in the pairwise loss."""
    ridge: float = 0.05
    """Of a ridge, in proportion to the number of cells."""


def train(
    cells: Cells,
    *,
    names: Sequence[str],
    operators: Sequence[str],
    provenance: Mapping[str, Any],
    hidden: Sequence[Columns] = ((),),
    settings: Training = Training(),
    seed: int = 0,
) -> Predictor:
    """One predictor from all cells; see `train_folds`."""
    everything = np.arange(len(cells))
    return train_folds(
        cells,
        [everything],
        names=names,
        operators=operators,
        provenance=provenance,
        hidden=hidden,
        settings=settings,
        seed=seed,
    )[0]


def train_folds(
    cells: Cells,
    folds: Sequence[npt.NDArray[np.int64]],
    *,
    names: Sequence[str],
    operators: Sequence[str],
    provenance: Mapping[str, Any],
    hidden: Sequence[Columns] = ((),),
    settings: Training = Training(),
    seed: int = 0,
) -> list[Predictor]:
    """A predictor from the rows of each fold, and from no other row.

    Each time that a cell is seen, one of the sets of columns in `hidden` is missing from it, so that the
    predictor also knows what to make of pairs of which less is known. The same numbers for the same arguments
    on one kind of machine.
    """
    told = {**provenance, "settings": _exact(asdict(settings)), "seed": seed}
    flags = _flags(cells.missing, hidden)
    scales = [_scale(cells[rows]) for rows in folds]
    network = [number for number, rows in enumerate(folds) if len(rows) >= FEW]
    layers = dict(
        zip(network, _networks(cells, folds, scales, network, flags, hidden, settings, seed), strict=True)
    )
    for number, rows in enumerate(folds):
        if number not in layers:
            layers[number] = _ridge(cells[rows], scales[number], flags, hidden, settings, seed)
    return [
        Predictor(
            names=tuple(names),
            operators=tuple(operators),
            centre=scales[number][0],
            spread=scales[number][1],
            flags=flags,
            layers=layers[number],
            provenance={**told, "cells": len(rows)},
        )
        for number, rows in enumerate(folds)
    ]


def _scale(cells: Cells) -> tuple[Floats, Floats]:
    """Mean and standard deviation of what is known of each feature; 0 and 1 where there is nothing."""
    known = np.where(cells.missing, np.nan, cells.values.astype(np.float64))
    counted = (~cells.missing).sum(axis=0)
    centre = np.nansum(known, axis=0) / np.maximum(counted, 1)
    spread = np.sqrt(np.nansum((known - centre) ** 2, axis=0) / np.maximum(counted, 1))
    return centre.astype(np.float32), np.where(spread > 1e-6, spread, 1.0).astype(np.float32)


def _flags(missing: npt.NDArray[np.bool_], hidden: Sequence[Columns]) -> tuple[Columns, ...]:
    """Columns that are always missing together, where they ever are."""
    patterns = np.concatenate([missing, _hiding(hidden, missing.shape[1])])
    found: dict[bytes, list[int]] = {}
    for column in range(patterns.shape[1]):
        if patterns[:, column].any():
            found.setdefault(patterns[:, column].tobytes(), []).append(column)
    return tuple(map(tuple, found.values()))


def _hiding(hidden: Sequence[Columns], width: int) -> npt.NDArray[np.bool_]:
    """bool[len(hidden), width]: what each set hides."""
    found = np.zeros((len(hidden), width), np.bool_)
    for row, columns in zip(found, hidden, strict=True):
        row[list(columns)] = True
    return found


def _inputs(values: Tensor, missing: Tensor, scale: Tensor, flags: Sequence[Columns]) -> Tensor:
    """What `Predictor.inputs` gives, for [nets, batch, features] and [nets, 2, features]."""
    scaled = ((values - scale[:, :1]) / scale[:, 1:]).clamp(-MAX_WIDE, MAX_WIDE)
    shares = [missing[..., list(columns)].float().mean(-1, keepdim=True) for columns in flags]
    return torch.cat([scaled.masked_fill(missing, 0.0), *shares], dim=-1)


def _networks(
    cells: Cells,
    folds: Sequence[npt.NDArray[np.int64]],
    scales: Sequence[tuple[Floats, Floats]],
    chosen: Sequence[int],
    flags: Sequence[Columns],
    hidden: Sequence[Columns],
    settings: Training,
    seed: int,
) -> list[tuple[Layer, ...]]:
    """Train the members of all chosen folds side by side, as one product of matrices for each layer."""
    if not chosen:
        return []
    generator = torch.Generator().manual_seed(seed)
    owners = [number for number in chosen for _ in range(settings.members)]
    data = [torch.from_numpy(each) for each in (cells.values, cells.missing, cells.utility)]
    scale = torch.from_numpy(np.stack([np.stack(scales[owner]) for owner in owners]))
    hides = torch.from_numpy(_hiding(hidden, cells.values.shape[1]))
    rows = [torch.from_numpy(np.asarray(folds[owner])) for owner in owners]
    widths = (cells.values.shape[1] + len(flags), *settings.hidden, cells.utility.shape[1])
    starts = torch.tensor([float(np.nanmean(cells.utility[folds[owner]])) for owner in owners])
    weights, biases = _begun(widths, starts, generator)
    optimizer = torch.optim.AdamW(
        [
            {"params": weights, "weight_decay": settings.decay},
            {"params": biases, "weight_decay": 0.0},
        ],
        lr=settings.rate,
    )
    for step in range(settings.steps):
        drawn = torch.stack([r[torch.randint(len(r), (settings.batch,), generator=generator)] for r in rows])
        view = torch.randint(len(hides), drawn.shape, generator=generator)
        values, missing, wanted = (each[drawn] for each in data)
        told = _forward(_inputs(values, missing | hides[view], scale, flags), weights, biases)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * _pace(step, settings.steps)
        optimizer.zero_grad()
        _loss(told, wanted, settings).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return [_layers(weights, biases, at, settings.members) for at in range(0, len(owners), settings.members)]


def _begun(
    widths: Sequence[int], starts: Tensor, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights [nets, in, out] and biases [nets, 1, out] to begin with; heads that all say a net's start."""
    weights, biases = [], []
    for number, (before, after) in enumerate(pairwise(widths)):
        last = number == len(widths) - 2
        drawn = torch.randn(len(starts), before, after, generator=generator) * math.sqrt(2 / before)
        begun = starts[:, None, None] if last else torch.zeros(len(starts), 1, 1)
        weights.append((drawn * 0.1 if last else drawn).requires_grad_())
        biases.append(begun.repeat(1, 1, after).requires_grad_())
    return weights, biases


def _forward(signal: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        signal = torch.baddbmm(bias, signal, weight)
        if number < len(weights) - 1:
            signal = signal.relu()
    return signal


def _loss(told: Tensor, wanted: Tensor, settings: Training) -> Tensor:
    """Summed over nets, so that none has a say in what another learns."""
    known = ~wanted.isnan()
    wanted = wanted.nan_to_num(0.0)
    height = huber_loss(told, wanted, delta=settings.delta, reduction="none") * known
    first, second = torch.triu_indices(told.shape[-1], told.shape[-1], 1)
    better = (wanted[..., first] - wanted[..., second]) * (known[..., first] & known[..., second])
    apart = told[..., first] - told[..., second]
    wrong = better.abs() * softplus(-better.sign() * apart * settings.sharpness)
    nets: Tensor = height.mean((1, 2)) / settings.delta + settings.ranking * wrong.mean((1, 2))
    return nets.sum()


def _pace(step: int, steps: int, warm_up: int = 20) -> float:
    """The share of the learning rate: up in a line, down in a cosine to a hundredth."""
    return min(1.0, (step + 1) / warm_up) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _layers(weights: Sequence[Tensor], biases: Sequence[Tensor], at: int, members: int) -> tuple[Layer, ...]:
    return tuple(
        Layer(
            weights=weight.detach()[at : at + members].numpy().copy(),
            bias=bias.detach()[at : at + members, 0].numpy().copy(),
        )
        for weight, bias in zip(weights, biases, strict=True)
    )


def _ridge(
    cells: Cells,
    scale: tuple[Floats, Floats],
    flags: Sequence[Columns],
    hidden: Sequence[Columns],
    settings: Training,
    seed: int,
) -> tuple[Layer, ...]:
    """One linear layer, each member of a resample of the cells, which it sees with each set hidden."""
    rng = np.random.default_rng(seed)
    hides, scales = _hiding(hidden, cells.values.shape[1]), torch.from_numpy(np.stack(scale))[None]
    weights, biases = [], []
    for _ in range(settings.members):
        drawn = cells[rng.integers(len(cells), size=len(cells))]
        seen = np.concatenate([drawn.missing | hide for hide in hides])
        values = torch.from_numpy(np.tile(drawn.values, (len(hides), 1)))
        signal = _inputs(values[None], torch.from_numpy(seen)[None], scales, flags)[0].double().numpy()
        wanted = np.tile(drawn.utility.astype(np.float64), (len(hides), 1))
        mean = np.nanmean(wanted, axis=0)
        wanted = np.where(np.isnan(wanted), mean, wanted) - mean
        middle = signal.mean(axis=0)
        gram = (signal - middle).T @ (signal - middle)
        penalty = settings.ridge * len(signal) * np.eye(len(gram))
        fitted = np.linalg.solve(gram + penalty, (signal - middle).T @ wanted)
        weights.append(fitted)
        biases.append(mean - middle @ fitted)
    return (Layer(weights=np.stack(weights).astype(np.float32), bias=np.stack(biases).astype(np.float32)),)


def _exact(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON that can be digested."""
    return {name: value.hex() if isinstance(value, float) else value for name, value in settings.items()}
