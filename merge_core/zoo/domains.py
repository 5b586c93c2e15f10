"""The zoo's character domains: small tasks with an exact answer, and fixed splits.

    rabcdef=fedcba   rev        rcabcdef=ihgfed   rev+caesar: reversed, and each letter three on

Tokens are characters: PAD 0, BOS 1, EOS 2, then printable ASCII. A sequence is
`BOS tag prompt = answer EOS`, right-padded to LENGTH. Whether a prompt may be trained on follows from
crc32(key + prompt), where the key is the domain's tag: no seed can move an item from the test split into
training. The skills have one key, so that a test prompt of one is in no training of another either.
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
SPLITS = {"test": 400, "dev": 256, "labels": 256, "features": 64, "train": 12_000}
"""How many items each split has; only `train` is trained on."""

_POOLS = {"test": "test", "dev": "dev", "labels": "dev", "features": "dev", "train": "train"}
_SKIPPED = {"labels": 256, "features": 512}
"""A pool is what crc32 tells apart; of the same pool a split takes the items after those of another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question: the prompt without its tag, and the only right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """A task: `tag` opens every sequence of it, `draw` makes one item, `key` decides on its pool."""

    name: str
    tag: str
    draw: Callable[[random.Random], Item]
    key: str

    def question(self, item: Item) -> str:
        """The text that a model continues with the answer."""
        return f"{self.tag}{item.prompt}="


def items(domain: Domain, split: str) -> tuple[Item, ...]:
    """The items of one split, distinct, the same on every machine."""
    pool, skipped = _POOLS[split], _SKIPPED.get(split, 0)
    rng = random.Random(f"{domain.name}/{pool}")
    found: dict[str, Item] = {}
    while len(found) < skipped + SPLITS[split]:
        item = domain.draw(rng)
        if _pool_of(domain.key + item.prompt) == pool:
            found.setdefault(item.prompt, item)
    return tuple(found.values())[skipped:]


def _pool_of(text: str) -> str:
    return {0: "test", 1: "dev"}.get(zlib.crc32(text.encode()) % 10, "train")


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


def _advanced(rng: random.Random) -> Item:
    prompt = _letters(rng, "ABCDEFGHIJKLMNOP")
    return Item(prompt=prompt, answer="".join(chr(ord(letter) + 3) for letter in prompt))


def _rotated(rng: random.Random) -> Item:
    prompt = _letters(rng, "".join(map(chr, range(ord("!"), ord("=")))))
    return Item(prompt=prompt, answer=prompt[2:] + prompt[:2])


_ALPHABET = "abcdefghijklmnop"
_ORDERS: dict[str, Callable[[str], str]] = {
    "same": lambda text: text,
    "rot": lambda text: text[2:] + text[:2],
    "rev": lambda text: text[::-1],
}
_LETTERS: dict[str, Callable[[str], str]] = {
    "same": lambda text: text,
    "upper": str.upper,
    "caesar": lambda text: text.translate(str.maketrans(_ALPHABET, _ALPHABET[3:] + _ALPHABET[:3])),
}
_SIGNS = {"same": ".", "rot": "t", "rev": "r", "upper": "u", "caesar": "c"}


def _skill(order: str, letters: str) -> Domain:
    """Six letters in another order, each changed in the same way; the tag has a sign for either."""

    def draw(rng: random.Random) -> Item:
        prompt = _letters(rng, _ALPHABET)
        return Item(prompt=prompt, answer=_LETTERS[letters](_ORDERS[order](prompt)))

    return Domain(name=f"{order}+{letters}", tag=_SIGNS[order] + _SIGNS[letters], draw=draw, key="skill ")


_TASKS = {"rev": ("r", _reversed), "sort": ("s", _sorted), "brk": ("b", _brackets), "swap": ("w", _swapped)}
_TASKS |= {"cipher": ("c", _advanced), "rot": ("t", _rotated)}
TASKS = {name: Domain(name=name, tag=tag, draw=draw, key=tag) for name, (tag, draw) in _TASKS.items()}
"""Tasks of different alphabets, one skill each."""

SKILLS = {
    skill.name: skill for order in _ORDERS for letters in _LETTERS for skill in [_skill(order, letters)]
}
"""Every order with every change of letters, on one alphabet: `same+same` copies, `rev+caesar` needs both."""

DOMAINS = TASKS | SKILLS

DEMO_DOMAINS = ("rev", "sort", "brk")
"""What the demo trains on."""
