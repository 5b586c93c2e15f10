"""The zoo's domains: small character tasks with an exact answer, and fixed splits.

Tokens are characters: PAD 0, BOS 1, EOS 2, then printable ASCII. A sequence is
`BOS tag prompt = answer EOS`, right-padded to LENGTH. Which split a prompt belongs to follows from
crc32(tag + prompt): no seed can move an item from the test split into training.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

PAD, BOS, EOS = 0, 1, 2
FIRST_CHARACTER = 32
VOCABULARY = 98
LENGTH = 20
SPLITS = {"test": 400, "dev": 256, "train": 12_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question: the prompt without its tag, and the only right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """A task: `tag` opens every sequence of it, `draw` makes one item."""

    name: str
    tag: str
    draw: Callable[[random.Random], Item]

    def question(self, item: Item) -> str:
        """The text that a model continues with the answer."""
        return f"{self.tag}{item.prompt}="


def split_of(tag: str, prompt: str) -> str:
    """The split an item belongs to, from its text alone."""
    return {0: "test", 1: "dev"}.get(zlib.crc32((tag + prompt).encode()) % 10, "train")


def items(domain: Domain, split: str) -> tuple[Item, ...]:
    """The items of one split, distinct, the same on every machine."""
    rng = random.Random(f"{domain.name}/{split}")
    found: dict[str, Item] = {}
    while len(found) < SPLITS[split]:
        item = domain.draw(rng)
        if split_of(domain.tag, item.prompt) == split:
            found.setdefault(item.prompt, item)
    return tuple(found.values())


def encode(text: str) -> list[int]:
    """Token ids of printable ASCII, without BOS or EOS."""
    return [ord(character) - FIRST_CHARACTER + 3 for character in text]


def decode(ids: list[int]) -> str:
    """The text of token ids up to the first EOS; PAD and BOS are left out."""
    upto = ids[: ids.index(EOS)] if EOS in ids else ids
    return "".join(chr(i - 3 + FIRST_CHARACTER) for i in upto if i > EOS)


def _letters(rng: random.Random, alphabet: str, count: int = 6) -> str:
    return "".join(rng.choice(alphabet) for _ in range(count))


def _reversed(rng: random.Random) -> Item:
    prompt = _letters(rng, "abcdefghijklmnop")
    return Item(prompt=prompt, answer=prompt[::-1])


def _sorted(rng: random.Random) -> Item:
    prompt = _letters(rng, "0123456789")
    return Item(prompt=prompt, answer="".join(sorted(prompt)))


_CLOSER = {"(": ")", "[": "]", "{": "}"}


def _brackets(rng: random.Random) -> Item:
    """Eight characters that leave four to six brackets open; the answer closes them in order."""
    while True:
        prompt, open_ = "", ""
        while len(prompt) < 8:
            if open_ and rng.random() < 0.2:
                prompt += _CLOSER[open_[-1]]
                open_ = open_[:-1]
            else:
                bracket = rng.choice("([{")
                prompt, open_ = prompt + bracket, open_ + bracket
        if 4 <= len(open_) <= 6:
            return Item(prompt=prompt, answer="".join(_CLOSER[b] for b in reversed(open_)))


def _swapped(rng: random.Random) -> Item:
    prompt = _letters(rng, "qrstuvwxyzQRSTUV")
    return Item(prompt=prompt, answer="".join(prompt[i + 1] + prompt[i] for i in range(0, 6, 2)))


DOMAINS = {
    domain.name: domain
    for domain in (
        Domain(name="rev", tag="r", draw=_reversed),
        Domain(name="sort", tag="s", draw=_sorted),
        Domain(name="brk", tag="b", draw=_brackets),
        Domain(name="swap", tag="w", draw=_swapped),
    )
}
"""Every domain; the demo trains on the first three."""

DEMO_DOMAINS = ("rev", "sort", "brk")
