"""The output's tokenizer: the tokens of one model or of all, and the files that hold them.

A union keeps the ids of the model that it begins with. Then come the plain tokens of the others, in the
order of the models and of their ids there, then their added tokens likewise, then tokens that only a rule
names. All of them are added tokens: a tokenizer's own model cannot learn another's. Tokens for which a
model has no row are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from merge_core.checkpoint.manifest import FUNCTIONAL_FILES
from merge_core.checkpoint.reader import parse_config
from merge_core.config_keys import stated
from merge_core.errors import CorruptCheckpoint, MergeCoreError, Unmergeable
from merge_core.tokenizer.plan import MAX_ROWS, TokenizerPlan
from merge_core.tokenizer.vocabulary import (
    CONFIG,
    DOCUMENT,
    HINT,
    AddedToken,
    Vocabulary,
    grow,
    parse_object,
    read_vocabulary,
)

FILES = tuple(name for name in FUNCTIONAL_FILES if name != "config.json")
"""What goes with a tokenizer: its files, and the one that names tokens by their ids."""

_KEPT = frozenset(
    {"chat_template.jinja", "generation_config.json", "special_tokens_map.json", DOCUMENT, CONFIG}
)
"""What remains when the tokens are others than the donor's: the rest would still hold those."""

Files = Callable[[], Mapping[str, bytes]]
"""Gives the functional files of a model, by name, when they are needed."""


class Tokenizers:
    """The tokenizers of a step's models, and the one that is made of them; read when they are asked for."""

    def __init__(
        self,
        plan: TokenizerPlan,
        files: Sequence[Files],
        names: Mapping[int, str] | None = None,
    ) -> None:
        """`files` are those of the sources that the step may take from; `names` are theirs in errors."""
        self._plan = plan
        self._files = files
        self._names = names or {}
        self._read: dict[int, tuple[Vocabulary, Mapping[str, bytes]]] = {}

    def of(self, source: int) -> Vocabulary:
        """The tokens of a model that it has rows for; raises CorruptCheckpoint or Unmergeable."""
        return self._load(source)[0]

    def rows_of(self, source: int) -> int:
        """How many tokens a model has rows for, as its config states it, or else its tokenizer."""
        vocabulary, files = self._load(source)
        return _rows_of(files) or 1 + max(vocabulary.ids.values(), default=0)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens of the output; raises CorruptCheckpoint or Unmergeable, as `files` does."""
        plan = self._plan
        first = self.of(plan.donor)
        tokens = _union(first, [self.of(m) for m in plan.models[1:]]) if plan.source is None else []
        known = first.ids.keys() | {token.content for token in tokens}
        tokens += [AddedToken(content=rule.token) for rule in plan.rules if rule.token not in known]
        try:
            return grow(first, tokens)
        except ValueError as error:
            raise Unmergeable(
                f"{self._name(plan.donor)} takes no more tokens: {error}",
                hint="choose another model's tokenizer, or tokenizer_source: base",
            ) from error

    @property
    def rows(self) -> int:
        """How many rows the tokens of the output need."""
        return 1 + max(self.vocabulary.ids.values(), default=0)

    @cached_property
    def files(self) -> Mapping[str, bytes]:
        """The files of the output's tokenizer: the donor's, written anew if the tokens are others."""
        donor = self._plan.donor
        given = self._files[donor]()
        files = self._load(donor)[1]
        if self.vocabulary != self.of(donor):
            if DOCUMENT not in given:
                raise Unmergeable(
                    f"{self._name(donor)} has no {DOCUMENT}, which tokens could be added to",
                    hint="open its tokenizer with AutoTokenizer and save_pretrained, which writes one",
                )
            files = _with_tokens(files, self.vocabulary)
        changed = files.get(DOCUMENT) != given.get(DOCUMENT)
        return {name: files[name] for name in FILES if name in files and (name in _KEPT or not changed)}

    def _load(self, source: int) -> tuple[Vocabulary, Mapping[str, bytes]]:
        """A model's vocabulary and files without the tokens that it has no row for."""
        if source not in self._read:
            try:
                self._read[source] = _within_rows(self._files[source]())
            except MergeCoreError as error:
                raise type(error)(f"{self._name(source)}: {error.why}", hint=error.hint) from error
        return self._read[source]

    def _name(self, source: int) -> str:
        return self._names.get(source, f"source {source} of the plan")


def _union(first: Vocabulary, others: Sequence[Vocabulary]) -> list[AddedToken]:
    """What `first` lacks of the others, in the order in which it is added."""
    added: dict[str, AddedToken] = {}
    for vocabulary in (first, *others):
        for token in vocabulary.added:
            added.setdefault(token.content, token)
    plain: dict[str, None] = {}
    for vocabulary in others:
        plain.update(dict.fromkeys(token for token in vocabulary.ids if token and token not in added))
    return [AddedToken(content=token) for token in plain if token not in first.ids] + [*added.values()]


def _rows_of(files: Mapping[str, bytes]) -> int | None:
    """The number of tokens that a model has rows for, as its config states it."""
    config = parse_config(files["config.json"]) if "config.json" in files else {}
    rows = stated(config, "vocab_size")
    return rows if type(rows) is int and 0 < rows <= MAX_ROWS else None


def _within_rows(files: Mapping[str, bytes]) -> tuple[Vocabulary, Mapping[str, bytes]]:
    vocabulary, limit = read_vocabulary(files), _rows_of(files)
    if limit is None or limit > max(vocabulary.ids.values(), default=0):
        return vocabulary, files
    if DOCUMENT not in files:
        raise Unmergeable(f"it has {limit} rows and more tokens", hint=f"add a {DOCUMENT} without those")
    try:
        stripped = {**files, **_strip(files, limit)}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CorruptCheckpoint(f"not a tokenizer: {error}", hint=HINT) from error
    return read_vocabulary(stripped), stripped


def _strip(files: Mapping[str, bytes], limit: int) -> dict[str, bytes]:
    """The files that change when tokens from `limit` on go; of a vocabulary that was read before."""
    document = parse_object(DOCUMENT, files[DOCUMENT])
    model = document["model"]
    document["added_tokens"] = [item for item in document.get("added_tokens", []) if item["id"] < limit]
    listed = model["vocab"]
    size = max(listed.values(), default=0) + 1 if isinstance(listed, dict) else len(listed)
    if size > limit:
        if not isinstance(listed, dict) or not isinstance(model.get("merges"), list):
            raise Unmergeable(
                f"its vocabulary has tokens beyond its {limit} rows, which only BPE can lose",
                hint="choose another model's tokenizer",
            )
        model["vocab"] = kept = {token: number for token, number in listed.items() if number < limit}
        model["merges"] = [merge for merge in model["merges"] if _possible(merge, kept)]
    changed = {DOCUMENT: _write(document)}
    config = parse_object(CONFIG, files.get(CONFIG, b"{}"))
    if isinstance(config.get("added_tokens_decoder"), dict):
        decoder = config["added_tokens_decoder"].items()
        changed[CONFIG] = _write(
            config | {"added_tokens_decoder": {t: v for t, v in decoder if int(t) < limit}}
        )
    return changed


def _possible(merge: Any, tokens: Mapping[str, int]) -> bool:
    """Whether both halves of a merge and what they make are tokens."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in tokens and right in tokens and left + right in tokens


def _with_tokens(files: Mapping[str, bytes], vocabulary: Vocabulary) -> dict[str, bytes]:
    """The files of a tokenizer with the added tokens of a vocabulary."""
    document = parse_object(DOCUMENT, files[DOCUMENT])
    document["added_tokens"] = [
        {"id": vocabulary.ids[token.content]} | token.to_value() for token in vocabulary.added
    ]
    written = {DOCUMENT: _write(document)}
    config = parse_object(CONFIG, files.get(CONFIG, b"{}"))
    if config.get("added_tokens_decoder") is not None:
        config["added_tokens_decoder"] = {
            str(vocabulary.ids[token.content]): token.to_value() for token in vocabulary.added
        }
        written[CONFIG] = _write(config)
    return {**files, **written}


def _write(value: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise CorruptCheckpoint(
            f"a tokenizer holds text that is not Unicode: {error.reason}", hint=HINT
        ) from error
