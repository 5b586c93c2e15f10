"""What there is to train: the shape, the base and the experts of each kind of zoo, as values.

    RECIPES["demo"].experts["rev"].steps  ->  120

demo       three character domains, one expert each, that merge well
text       three text domains, measured in bits per byte
skills     two experts of which each has one half of what `rev+caesar` asks for; nobody is trained on that
catalogue  twenty experts on one or two of five domains, trained with more and less care
mixed      five experts, one on each of those domains, of which no two were trained alike
mixed_text three on text, likewise: one kept to the base nowhere else, one learned fast
fixture    the demo, smaller, for tests

What decides whether such small experts merge: the base is part-skilled (it stops by its skill in each domain,
not by steps, where skill can be measured), an expert pays KL(base || expert) on the other domains' sequences,
and the task vectors, which then hardly conflict, are summed, not averaged.
"""

from __future__ import annotations

import json
import platform
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

from merge_core.zoo import text
from merge_core.zoo.domains import DEMO_DOMAINS, VOCABULARY


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama with tied embeddings, for sequences of at most `context` tokens."""

    hidden: int = 96
    intermediate: int = 192
    layers: int = 2
    heads: int = 4
    vocabulary: int = VOCABULARY
    context: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseTraining:
    """The base sees `domains`, divided by a thermostat: it stops when each has reached `skill` on dev.

    A domain above `skill` is fed a tenth, above `plenty` nothing. Where `skill` is None all are fed alike,
    for all `steps`.
    """

    domains: tuple[str, ...]
    steps: int = 300
    batch: int = 96
    skill: float | None = 0.12
    plenty: float = 0.30


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTraining:
    """An expert learns `own`, domains with their shares, and keeps the base's predictions `elsewhere`."""

    own: Mapping[str, float]
    elsewhere: tuple[str, ...]
    steps: int = 120
    rate: float = 1e-3
    kl_weight: float = 1.0
    batch: int = 64
    batch_elsewhere: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecipe:
    """One kind of zoo; the base's learning rates are those of the demo's size."""

    shape: Shape
    base: BaseTraining
    experts: Mapping[str, ExpertTraining]

    @property
    def domains(self) -> tuple[str, ...]:
        """Every domain that something is trained on, the base's first."""
        owned = [domain for expert in self.experts.values() for domain in expert.own]
        return tuple(dict.fromkeys([*self.base.domains, *owned]))


def _one_each(domains: tuple[str, ...], **settings: int) -> dict[str, ExpertTraining]:
    """An expert for each domain, named like it."""
    return {
        name: ExpertTraining(
            own={name: 1.0}, elsewhere=tuple(other for other in domains if other != name), **settings
        )
        for name in domains
    }


def _by_hands(hands: Mapping[str, tuple[float, float, int]], **settings: int) -> dict[str, ExpertTraining]:
    """An expert for each domain, with a learning rate, a KL weight and a number of steps of its own."""
    alike = _one_each(tuple(hands), **settings)
    return {
        name: replace(alike[name], rate=rate, kl_weight=kl_weight, steps=steps)
        for name, (rate, kl_weight, steps) in hands.items()
    }


def catalogue(count: int) -> TrainingRecipe:
    """A base and `count` experts that are worth choosing among; a larger one begins with the smaller.

    Experts that kept to the base elsewhere are best summed, others averaged or thinned: KL weight, steps,
    learning rate and the shares of domains are drawn for each, by one fixed stream.
    """
    rng = random.Random("weft catalogue")
    experts = {}
    for number in range(count):
        main = _CATALOGUED[number % len(_CATALOGUED)]
        second = rng.choice([name for name in _CATALOGUED if name != main])
        own = rng.choice([{main: 1.0}, {main: 0.75, second: 0.25}, {main: 0.5, second: 0.5}])
        experts[f"e{number + 1:02}"] = ExpertTraining(
            own=own,
            elsewhere=tuple(name for name in _CATALOGUED if name not in own),
            steps=rng.choice([60, 120, 200]),
            rate=rng.choice([5e-4, 1e-3, 2e-3]),
            kl_weight=rng.choice([0.0, 0.3, 1.0, 3.0]),
        )
    return TrainingRecipe(shape=Shape(), base=BaseTraining(domains=_CATALOGUED), experts=experts)


_CATALOGUED = ("rev", "sort", "brk", "swap", "rot")
_TEXT = Shape(layers=3, intermediate=256, vocabulary=text.VOCABULARY, context=text.LENGTH)
_TEXT_BASE = BaseTraining(domains=text.TEXT_DOMAINS, steps=260, batch=24, skill=None)
_HANDS = {
    "rev": (1e-3, 1.0, 120),
    "sort": (2e-3, 0.3, 120),
    "brk": (5e-4, 1.0, 120),
    "swap": (1e-3, 0.1, 200),
    "rot": (2e-3, 1.0, 60),
}
_TEXT_HANDS = {"code": (2e-3, 0.0, 140), "docs": (1e-3, 1.0, 140), "tables": (2e-3, 1.0, 140)}
"""Learning rate, KL weight and steps of each, made up beforehand: careful hands, and careless ones."""
_KNOWN = ("same+same", "rot+same", "same+upper", "rot+upper")
_SKILLS = {
    "rev": {"rev+same": 1.0, "rev+upper": 1.0},
    "caesar": {"same+caesar": 1.0, "rot+caesar": 1.0},
}


def _unlearned(own: Mapping[str, float]) -> tuple[str, ...]:
    """What the base knows, and what another expert learns."""
    others = [domain for each in _SKILLS.values() for domain in each if domain not in own]
    return (*_KNOWN, *others)


RECIPES = {
    "demo": TrainingRecipe(
        shape=Shape(), base=BaseTraining(domains=DEMO_DOMAINS), experts=_one_each(DEMO_DOMAINS)
    ),
    "fixture": TrainingRecipe(
        shape=Shape(hidden=64, intermediate=128),
        base=BaseTraining(domains=DEMO_DOMAINS, batch=64),
        experts=_one_each(DEMO_DOMAINS, steps=100),
    ),
    "text": TrainingRecipe(
        shape=_TEXT,
        base=_TEXT_BASE,
        experts=_one_each(text.TEXT_DOMAINS, steps=140, batch=16, batch_elsewhere=8),
    ),
    "skills": TrainingRecipe(
        shape=Shape(),
        base=BaseTraining(domains=_KNOWN, skill=0.9, plenty=0.95),
        experts={
            name: ExpertTraining(own=own, elsewhere=_unlearned(own), steps=200)
            for name, own in _SKILLS.items()
        },
    ),
    "catalogue": catalogue(20),
    "mixed": TrainingRecipe(
        shape=Shape(), base=BaseTraining(domains=tuple(_HANDS)), experts=_by_hands(_HANDS)
    ),
    "mixed_text": TrainingRecipe(
        shape=_TEXT,
        base=_TEXT_BASE,
        experts=_by_hands(_TEXT_HANDS, batch=16, batch_elsewhere=8),
    ),
}
"""By the name that `build` takes for a size."""

_VERSION = 2


def origin(seed: int, size: str) -> dict[str, Any]:
    """What a zoo is a function of: version, seed, size and its recipe, torch, Python where it gives text."""
    recipe, versions = RECIPES[size], {"torch": metadata.version("torch")}
    if not set(text.TEXT_DOMAINS).isdisjoint(recipe.domains):
        versions["python"] = platform.python_version()
    settings = json.loads(json.dumps(asdict(recipe)))
    return {"version": _VERSION, "seed": seed, "size": size, "recipe": settings, **versions}
