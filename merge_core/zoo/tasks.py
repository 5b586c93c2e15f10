"""The zoo's domains as evaluation tasks, by name and split.

    task("rev:test").metric  ->  Metric.EXACT_MATCH
    task("code:dev").metric  ->  Metric.BITS_PER_BYTE
    names()                  ->  ("rev:test", "rev:dev", …)

Nothing was trained on the items of any split but `train`, and no two splits of a domain share an item.
"""

from __future__ import annotations

from functools import cache

from merge_core.evaluation.tasks import Item, Metric, Task, unknown
from merge_core.zoo import domains, text


def task(name: str) -> Task:
    """The task `domain:split`, the same on every machine; of text, with every Python of one version.

    Raises InvalidTask on a domain or a split that there is not.
    """
    domain, _, split = name.partition(":")
    if name not in names():
        raise unknown(name, names())
    if domain in text.TEXT_DOMAINS:
        asked = [(item.prompt, item.answer) for item in text.items(domain, split)]
        metric = Metric.BITS_PER_BYTE
    else:
        found = domains.DOMAINS[domain]
        asked = [(found.question(item), item.answer) for item in domains.items(found, split)]
        metric = Metric.EXACT_MATCH
    items = tuple(Item(prompt=prompt, answer=answer) for prompt, answer in asked)
    return Task(name=name, metric=metric, items=items)


@cache
def names() -> tuple[str, ...]:
    """The names of all tasks, by domain and split."""
    characters = [f"{domain}:{split}" for domain in domains.DOMAINS for split in domains.SPLITS]
    return (*characters, *(f"{domain}:{split}" for domain in text.TEXT_DOMAINS for split in text.SPLITS))
