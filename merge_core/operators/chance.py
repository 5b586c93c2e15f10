"""Chance without a state: what an element draws follows from a key and its index alone.

Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405) turns a 64 bit key and the counter ⌊index/4⌋
into four draws of 32 bits; an element takes the one at its index modulo 4. Nothing depends on order, chunk,
thread or device. An element is kept when its draw is below a whole number: no rounding decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_WORD = (1 << 32) - 1


def limit(probability: float) -> int:
    """Below how many of the 2³² draws an element is kept: ⌊p·2³²⌋, for a probability from 0 to 1."""
    return int(min(max(probability, 0.0), 1.0) * 2.0**32)


def halves(key: int) -> tuple[int, int]:
    """The lower and the upper 32 bits of a key."""
    return key & _WORD, key >> 32 & _WORD


def draws(key: int, like: Tensor, start: int) -> Tensor:
    """What the elements of `like`, one dimension, draw: int64, `start` is the index of the first."""
    import torch

    first, stop = start // 4, (start + len(like) + 3) // 4
    counter = torch.arange(first, stop, device=like.device)
    zeros = torch.zeros_like(counter)
    words = philox((counter & _WORD, counter >> 32, zeros, zeros), halves(key))
    skip = start - 4 * first
    return torch.stack(words, dim=1).flatten()[skip : skip + len(like)]


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds over four words, each an int64 tensor of numbers below 2³²; the key is two such words.

    A product of two words may pass 2⁶³: it wraps, and its bits are right.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3
