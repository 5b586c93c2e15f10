"""The Vocabulary: the tokens of a model and their ids, from its tokenizer files, which may come from anybody.

    tokenizer.json   BPE, WordPiece and WordLevel (a mapping), Unigram (a list, whose places are the ids)
    vocab.json       with added_tokens.json
    vocab.txt        one token a line

What tokenizer_config.json adds counts too. A vocabulary with two tokens for one id, or an id that no loader
would give, is refused: a merge would move the wrong rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from merge_core.checkpoint.manifest import MAX_FUNCTIONAL_FILE
from merge_core.digest import MAX_VALUES
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.tokenizer.plan import MAX_ROWS, MAX_TOKEN

CONFIG = "tokenizer_config.json"
DOCUMENT = "tokenizer.json"
TOKENIZER_FILES = frozenset(
    {DOCUMENT, CONFIG, "added_tokens.json", "chat_template.jinja", "config.json", "vocab.json", "vocab.txt"}
)
"""What says which tokens a model has, how many rows for them, and how it is talked to."""
HINT = "save the tokenizer again with save_pretrained, then: weft add DIR"


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """A token that is cut out of the text before the model of the tokenizer sees it."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False

    def to_value(self) -> dict[str, Any]:
        """The token as tokenizer files spell it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Every token with its id, in the order of the ids; `added` are those of them that were added, likewise.

    `in_model` is the number of tokens that the model of the tokenizer has without the added ones.
    """

    ids: Mapping[str, int]
    added: tuple[AddedToken, ...]
    in_model: int


class _Growing:
    """A vocabulary to which tokens are added as loaders do."""

    def __init__(self, ids: Mapping[str, int], added: Iterable[AddedToken], in_model: int) -> None:
        self._ids = dict(ids)
        self._taken = set(self._ids.values())
        self._added = {token.content: token for token in added}
        self._in_model = in_model
        self._next = max([in_model, *(self._ids[content] + 1 for content in self._added)])
        if len(self._taken) < len(self._ids):
            raise ValueError("two tokens have one id")

    def add(self, token: AddedToken, stated: int | None = None) -> None:
        """Add a token, unless it was added before.

        Raises ValueError when its id is not the one that was stated, or is another's.
        """
        known = self._ids.get(token.content)
        given = self._next if known is None else known
        if stated is not None and given != stated:
            raise ValueError(f"token {token.content[:80]!r} has id {stated}, and loaders give it {given}")
        if known is None:
            if given in self._taken or given >= MAX_ROWS:
                raise ValueError(f"there is no free id for token {token.content[:80]!r}")
            self._ids[token.content] = given
            self._taken.add(given)
        self._added.setdefault(token.content, token)
        self._next = max(self._next, given + 1)

    def freeze(self) -> Vocabulary:
        """The vocabulary as it is now."""
        ids = dict(sorted(self._ids.items(), key=lambda item: item[1]))
        added = sorted(self._added.values(), key=lambda token: ids[token.content])
        return Vocabulary(ids=ids, added=tuple(added), in_model=self._in_model)


def grow(vocabulary: Vocabulary, tokens: Iterable[AddedToken]) -> Vocabulary:
    """A vocabulary with tokens added, in order; raises ValueError where there is no free id."""
    growing = _Growing(vocabulary.ids, vocabulary.added, vocabulary.in_model)
    for token in tokens:
        growing.add(token)
    return growing.freeze()


def read_vocabulary(files: Mapping[str, bytes]) -> Vocabulary:
    """The vocabulary that tokenizer files hold.

    Raises CorruptCheckpoint on a file that is not what it should be, Unmergeable where none can be read.
    """
    reader = next((reader for name, reader in _READERS.items() if name in files), None)
    if reader is None:
        if "tokenizer.model" in files:
            raise Unmergeable(
                "its tokenizer is a tokenizer.model alone, which cannot be aligned",
                hint="open it with AutoTokenizer and save_pretrained, which writes tokenizer.json",
            )
        raise Unmergeable("it has no tokenizer that can be read", hint="add its tokenizer.json")
    try:
        growing = reader(files)
        _declared(files, growing)
        return growing.freeze()
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CorruptCheckpoint(f"not a tokenizer: {error}", hint=HINT) from error


def parse_object(name: str, data: bytes) -> dict[str, Any]:
    """A JSON object that may come from anybody, in which no key occurs twice; raises CorruptCheckpoint."""
    try:
        if len(data) > MAX_FUNCTIONAL_FILE or sum(map(data.count, (b"[", b"{", b","))) > MAX_VALUES:
            raise ValueError("more than is read")
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{name}: {error}", hint=HINT) from error
    return value


def added_token(value: Any) -> AddedToken:
    """An added token as tokenizer files spell it; raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("an added token is not an object")
    flags = {flag: value.get(flag, default) for flag, default in _FLAGS.items()}
    if any(type(flag) is not bool for flag in flags.values()):
        raise ValueError("an added token with a flag that is not true or false")
    return AddedToken(content=_token(value.get("content")), **flags)


def _from_document(files: Mapping[str, bytes]) -> _Growing:
    document = parse_object(DOCUMENT, files[DOCUMENT])
    model, added = document.get("model"), document.get("added_tokens", [])
    if not isinstance(model, dict) or not isinstance(added, list):
        raise ValueError("tokenizer.json has no model")
    ids = _listed(model.get("vocab"))
    growing = _Growing(ids, (), len(ids))
    for item in added:
        growing.add(added_token(item), stated=_id(item.get("id")))
    return growing


def _from_mapping(files: Mapping[str, bytes]) -> _Growing:
    ids = _listed(parse_object("vocab.json", files["vocab.json"]))
    growing = _Growing(ids, (), len(ids))
    extra = _listed(parse_object("added_tokens.json", files.get("added_tokens.json", b"{}")))
    for token, number in sorted(extra.items(), key=lambda item: item[1]):
        growing.add(AddedToken(content=token, normalized=False), stated=number)
    return growing


def _from_lines(files: Mapping[str, bytes]) -> _Growing:
    lines = files["vocab.txt"].decode("utf-8").split("\n")
    tokens = [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    ids = {_token(token): number for number, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        raise ValueError("a token occurs twice in vocab.txt")
    return _Growing(ids, (), len(ids))


_READERS: Mapping[str, Callable[[Mapping[str, bytes]], _Growing]] = {
    DOCUMENT: _from_document,
    "vocab.json": _from_mapping,
    "vocab.txt": _from_lines,
}


def _declared(files: Mapping[str, bytes], growing: _Growing) -> None:
    """Add what tokenizer_config.json adds."""
    declared = parse_object(CONFIG, files.get(CONFIG, b"{}")).get("added_tokens_decoder") or {}
    if not isinstance(declared, dict):
        raise ValueError("added_tokens_decoder is not an object")
    for text in sorted(declared, key=_decimal):
        growing.add(added_token(declared[text]), stated=_decimal(text))


def _listed(vocabulary: Any) -> dict[str, int]:
    """The tokens of a model: a mapping to ids, or a list of tokens with scores."""
    if isinstance(vocabulary, dict):
        return {_token(token): _id(number) for token, number in vocabulary.items()}
    if not isinstance(vocabulary, list):
        raise ValueError("the vocabulary is neither a mapping nor a list")
    ids = {_token(entry[0]): number for number, entry in enumerate(vocabulary)}
    if len(ids) < len(vocabulary):
        raise ValueError("a token occurs twice in the vocabulary")
    return ids


def _token(value: Any) -> str:
    # The empty token is in some vocabularies of sentence pieces.
    if not isinstance(value, str) or len(value) > MAX_TOKEN:
        raise ValueError(f"a token of at most {MAX_TOKEN} characters was expected")
    return value


def _id(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MAX_ROWS:
        raise ValueError(f"the id {str(value)[:20]} of a token is not below {MAX_ROWS}")
    return value


def _decimal(text: str) -> int:
    if len(text) > 8 or not text.isascii() or not text.isdigit():
        raise ValueError(f"the id {text[:20]!r} of a token is not a number")
    return _id(int(text))


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    listed = list(pairs)
    value = dict(listed)
    if len(value) < len(listed):
        raise ValueError("a key occurs twice")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


_FLAGS = {field.name: field.default for field in fields(AddedToken) if field.name != "content"}
