"""Spelling: the texts of a task as tokens, as the model is asked and as it answers.

A tokenizer gives no tokens of its own between a prompt and an answer, and what it puts before every text
comes once, in front. Text is compared, not tokens: a model may spell an answer in more than one way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from merge_core.errors import Unmergeable
from merge_core.evaluation.prediction import Asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelled:
    """What is asked, and how many bytes of text the tokens to be predicted spell."""

    asked: Asked
    bytes: int


class Speller:
    """A tokenizer beside its model.

    `ends` are the tokens that end an answer, the usual one first; there may be none. A text without a prompt,
    which the tokenizer opens with nothing, is opened with the first token that the config names (BOS).
    """

    def __init__(self, tokenizer: Tokenizer, model: Any, vocabulary: int) -> None:
        """Look up the tokens that open and end texts."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        special = tokenizer.encode("a").special_tokens_mask
        before = special.index(0) if 0 in special else len(special)
        self._opening: list[int] = list(tokenizer.encode("a").ids[:before])
        self._first = self._known([getattr(model.config, "bos_token_id", None)])
        stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        stated = getattr(model.config, "eos_token_id", None) if stated is None else stated
        self.ends = self._known(stated if isinstance(stated, list) else [stated])

    def _known(self, ids: Sequence[Any]) -> list[int]:
        return [i for i in ids if type(i) is int and 0 <= i < self._vocabulary]

    def answers(self, pairs: Sequence[tuple[str, str]]) -> list[Spelled]:
        """Each answer after its prompt, as the model is asked, and last a token that ends it (or any)."""
        prompts, wholes = self._encode([p for p, _ in pairs]), self._encode([p + a for p, a in pairs])
        found: list[Spelled] = []
        for (_, text), prompt, whole in zip(pairs, prompts, wholes, strict=True):
            answer = whole.ids[len(prompt.ids) :]
            if whole.ids[: len(prompt.ids)] != prompt.ids:  # they share a token, which no model would write
                answer = self._encode([text])[0].ids
            context = [*self._opening, *prompt.ids]
            ids = [*context, *answer, *(self.ends[:1] or [0])]
            found.append(self._checked(ids if answer else context, len(context), text, len(found)))
        return found

    def texts(self, pairs: Sequence[tuple[str, str]]) -> list[Spelled]:
        """Each second text after the first; a token that belongs to both is the second's."""
        found: list[Spelled] = []
        for (before, text), whole in zip(pairs, self._encode([b + t for b, t in pairs]), strict=True):
            whole_text, ends = before + text, [end for _, end in whole.offsets]
            own = next((i for i, end in enumerate(ends) if end > len(before)), len(ends))
            opening = self._opening or ([] if before else self._first)
            ids, start = [*opening, *whole.ids], len(opening) + own
            if start == 0 and not before and ids:  # nothing comes before the first token: it is given
                start, text = 1, text[ends[0] :]
            if _drops(whole.offsets, len(whole_text)) and not self._spells(whole.ids, whole_text):
                raise Unmergeable(
                    f"the tokenizer drops characters of item {len(found) + 1}: they would cost nothing",
                    hint="choose a task in characters that the tokenizer knows",
                )
            found.append(self._checked(ids, start, text, len(found)))
        return found

    def _spells(self, ids: list[int], text: str) -> bool:
        """Whether tokens decode to a text, itself or as it is normalized, but for white space."""
        normalizer = self._tokenizer.normalizer
        normal = normalizer.normalize_str(text) if normalizer else text
        told = self._tokenizer.decode(ids, skip_special_tokens=False).split()
        return "".join(told) in ("".join(text.split()), "".join(normal.split()))

    def _encode(self, texts: list[str]) -> list[Any]:
        return list(self._tokenizer.encode_batch(texts, add_special_tokens=False))

    def _checked(self, ids: list[int], start: int, text: str, index: int) -> Spelled:
        if not 0 < start < len(ids) or not text:
            raise Unmergeable(
                f"the tokenizer has too few tokens for the texts of item {index + 1}",
                hint="choose a task in characters that the tokenizer knows",
            )
        if max(ids) >= self._vocabulary:
            raise Unmergeable("the tokenizer knows tokens that the model does not")
        return Spelled(asked=Asked(ids=ids, start=start), bytes=len(text.encode()))

    def text(self, context: Sequence[int], more: Sequence[int]) -> str:
        """What `more` tokens add to the text of those before; special ones are text, too."""
        before, whole = (
            self._tokenizer.decode(list(ids), skip_special_tokens=False)
            for ids in (context, [*context, *more])
        )
        return whole.removeprefix(before)


def _drops(offsets: Sequence[tuple[int, int]], length: int) -> bool:
    """Whether some character has no token; where one is dropped, the library may count offsets without it."""
    reached = 0
    for first, last in offsets:
        if first > reached:
            return True
        reached = max(reached, last)
    return reached < length


def is_answer(wanted: str, text: str, *, ended: bool) -> bool | None:
    """Whether a model that has written `text` gave the answer; None while it may still.

    It ends with a token for that, or with a line break where the answer has none of its own.
    """
    line, broken, _ = text.partition("\n")
    if ended or (broken and "\n" not in wanted):
        return (text if ended else line) == wanted
    # The bytes of a character may come one token at a time; until it is whole it is decoded as U+FFFD.
    return None if wanted.startswith(text.rstrip("\ufffd")) else False
