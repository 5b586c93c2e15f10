"""The zoo's domains as evaluation tasks, by name and split.

    task("rev:test").metric  ->  Metric.EXACT_MATCH
    task("code:dev").metric  ->  Metric.BITS_PER_BYTE

Nothing was trained on the items of any split but `train`, and no two splits of a domain share an item.
"""

from __future__ import annotations

from merge_core.errors import InvalidTask
from merge_core.evaluation.tasks import Item, Metric, Task
from merge_core.zoo import domains, text


def task(name: str) -> Task:
    """The task `domain:split`, the same on every machine; of text, with every Python of one version.

    Raises InvalidTask on a domain or a split that there is not.
    """
    domain, _, split = name.partition(":")
    if domain in text.TEXT_DOMAINS and split in text.SPLITS:
        asked = [(item.prompt, item.answer) for item in text.items(domain, split)]
        metric = Metric.BITS_PER_BYTE
    elif domain in domains.DOMAINS and split in domains.SPLITS:
        found = domains.DOMAINS[domain]
        asked = [(found.question(item), item.answer) for item in domains.items(found, split)]
        metric = Metric.EXACT_MATCH
    else:
        raise InvalidTask(f"the zoo has no task {name[:80]!r}", hint=f"it has {', '.join(_offered())}")
    items = tuple(Item(prompt=prompt, answer=answer) for prompt, answer in asked)
    return Task(name=name, metric=metric, items=items)


def _offered() -> list[str]:
    """The names of all domains and splits, in short."""
    characters = f"DOMAIN:SPLIT with {'|'.join(domains.DOMAINS)} and {'|'.join(domains.SPLITS)}"
    return [characters, f"{'|'.join(text.TEXT_DOMAINS)} and {'|'.join(text.SPLITS)}"]
