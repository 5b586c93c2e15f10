"""The zoo's probe set: prompts of its domains, each followed by a copy of itself.

    made() == probes.find("zoo")

The prompts are those of the `features` split, on which nothing is trained or scored. What follows `=` is no
answer: the prompt once more. A model that has learnt the domain departs from the copy in a way of its own;
which way is right, the set does not say. On catalogues for tuning this told as much of merges as the base's
own continuation did, or the answers themselves.
"""

from __future__ import annotations

from merge_core.simmerge.functional.probes import Probe, ProbeSet
from merge_core.zoo.domains import DOMAINS, items

_DOMAINS = ("rev", "sort", "brk", "swap", "rot")
_PROMPTS = 17
_CHARACTERS = 6


def made() -> ProbeSet:
    """The set that `probes_zoo.jsonl` holds: 85 probes of six characters, 510 positions."""
    found = []
    for name in _DOMAINS:
        for item in items(DOMAINS[name], "features")[:_PROMPTS]:
            question, copied = DOMAINS[name].question(item), item.prompt[:_CHARACTERS]
            found.append(Probe(task=name, prompt=question, text=copied))
    return ProbeSet(name="zoo", probes=tuple(found))
