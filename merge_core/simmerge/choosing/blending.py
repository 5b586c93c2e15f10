"""Blending: what the fingerprint of a merge would be, from those of its parents, before it is made.

    blended((a, b), weights=(0.5, 0.5), base=base)         the average
    blended((a, b), weights=(1.0, 1.0), base=base)         the sum of task vectors

Of weights this is exact for what is linear in them, sketch and sample; of predictions it is the rule that
changes of logarithms add up like changes of weights, which training far from the base breaks. So a blend
stands for an intermediate result in a search, and is never published.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_core.digest import ModelId, canonical, sha256
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.functional.behaviour import FLOOR, Behaviour
from merge_core.simmerge.pairs.behaviours import Top, states
from merge_core.simmerge.structural.structure import Group, Structure

Array = npt.NDArray[np.float64]
Half = npt.NDArray[np.float16]


def blended(models: Sequence[Fingerprint], *, weights: Sequence[float], base: Fingerprint) -> Fingerprint:
    """base + Σ weight·(model − base), as far as fingerprints tell; models of one family.

    What the models cannot be compared in is left out.
    """
    behaviours = [model.behaviour for model in models]
    origin = base.behaviour
    behaviour = None
    if origin is not None and all(b is not None and b.key == origin.key for b in behaviours):
        with suppress(ValueError):  # numbers that were made up may add up to what no model does
            behaviour = _behaviour([b for b in behaviours if b is not None], weights, origin)
    told = [base.model_id, [[m.model_id, float(w).hex()] for m, w in zip(models, weights, strict=True)]]
    return Fingerprint(
        model_id=ModelId(sha256(canonical(told))),
        structure=_structure([model.structure for model in models], weights, base.structure),
        behaviour=behaviour,
    )


def _structure(structures: Sequence[Structure], weights: Sequence[float], base: Structure) -> Structure:
    by_key = [{group.key: group for group in structure.groups} for structure in structures]
    groups = [
        _group([groups[group.key] for groups in by_key], weights, group)
        for group in base.groups
        if all(group.key in known and known[group.key].layout == group.layout for known in by_key)
    ]
    return Structure(groups=tuple(groups), layers=base.layers)


def _group(groups: Sequence[Group], weights: Sequence[float], base: Group) -> Group:
    sketch = _added([group.sketch for group in groups], weights, base.sketch)
    sample = _added([group.sample for group in groups], weights, base.sample)
    seen = sketch if sketch.size else sample
    return replace(
        base,
        l2=float(np.sqrt(seen @ seen)),
        sketch=sketch.astype(np.float32),
        sample=sample.astype(np.float32),
    )


def _behaviour(behaviours: Sequence[Behaviour], weights: Sequence[float], base: Behaviour) -> Behaviour:
    ids, logp, rest, entropy = _predictions([Top.of(b) for b in behaviours], weights, Top.of(base))
    hidden = _added([states(b) for b in behaviours], weights, states(base))
    size = np.sqrt((hidden**2).sum(axis=1, keepdims=True))
    attention = _added([b.attention for b in behaviours], weights, base.attention)
    bits = _added([b.bits_per_byte for b in behaviours], weights, base.bits_per_byte)
    return replace(
        base,
        ids=ids,
        logp=logp,
        rest=rest,
        entropy=entropy,
        bits_per_byte=np.maximum(bits, 0.0).astype(np.float32),
        hidden=(hidden / np.maximum(size, 1e-9)).astype(np.float16),
        hidden_norm=size[:, 0].astype(np.float32),
        attention=attention.astype(np.float16),
    )


def _predictions(
    tops: Sequence[Top], weights: Sequence[float], base: Top
) -> tuple[npt.NDArray[np.uint32], Half, Half, Half]:
    """ids, logp, rest and entropy of p ∝ p_base · Π (p_i / p_base)^w_i.

    Over the tokens that anybody lists, each once, and one entry that stands for all others alike.
    """
    known = [*tops, base]
    ids = np.concatenate([top.ids for top in known], axis=1)
    earlier = np.tril(np.ones((ids.shape[1],) * 2, dtype=bool), -1)
    first = ~((ids[:, :, None] == ids[:, None, :]) & earlier).any(axis=2)
    others = base.others + base.ids.shape[1] - first.sum(axis=1)
    logs = [np.column_stack([top.at(ids), top.share]) for top in known]
    count = np.column_stack([first, others]).astype(np.float64)
    added = np.where(count > 0, _added(logs[:-1], weights, logs[-1]), -np.inf)
    added -= added.max(axis=1, keepdims=True)
    added -= np.log((count * np.exp(added)).sum(axis=1, keepdims=True))
    added = np.where(count > 0, np.maximum(added, FLOOR), -np.inf)
    entropy = -(count * np.exp(added) * np.where(count > 0, added, 0.0)).sum(axis=1)
    best = np.argsort(-added[:, :-1], axis=1, kind="stable")[:, : base.ids.shape[1]]
    logp = np.take_along_axis(added[:, :-1], best, axis=1)
    left = 1.0 - np.exp(logp).sum(axis=1)
    rest = np.where(left > np.exp(FLOOR), np.log(np.maximum(left, np.exp(FLOOR))), FLOOR)
    top_ids = np.take_along_axis(ids, best, axis=1)
    halves = (np.minimum(each, 0.0).astype(np.float16) for each in (logp, rest))
    return top_ids, *halves, np.maximum(entropy, 0.0).astype(np.float16)


def _added(parts: Sequence[npt.NDArray[Any]], weights: Sequence[float], base: npt.NDArray[Any]) -> Array:
    """base + Σ weight·(part − base), in float64."""
    origin = base.astype(np.float64)
    total = origin.copy()
    for weight, part in zip(weights, parts, strict=True):
        total += weight * (part.astype(np.float64) - origin)
    return total
