"""The TokenizerChoice: which tokens the output of a merge has, as a recipe says it.

    tokenizer_source: union              # or base, or one of the models

    tokenizer:
      source: union
      tokens:
        <|im_start|>: {source: ./chat}                                        # that model's row of it
        <|im_end|>: {source: {kind: model_token, model: ./base, token: </s>}, force: true}
        <|unused|>: {source: {kind: zero}}
      pad_to_multiple_of: 64

`read(choice.to_value()) == choice`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from merge_core.tokenizer.plan import MAX_ROWS, MAX_RULES, MAX_TOKEN

UNION, BASE = "union", "base"
ZERO = "zero"
MAX_MULTIPLE = 1 << 16

Fault = Callable[[str], None]
"""Is told what is wrong with a recipe."""
Reference = Callable[[str, Any], str | None]
"""Reads a reference to a model, given where it stands; tells a fault and gives None on anything else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelToken:
    """The row of one token of a model: the token of this text, else the one of this id."""

    model: str
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChoice:
    """What one token's row is in models that lack it, and with `force` in all; ZERO is zeros."""

    token: str
    source: ModelToken | str | None = None
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerChoice:
    """`source` is UNION, BASE or a reference; `tokens` are in the order in which they are listed."""

    source: str
    tokens: tuple[TokenChoice, ...] = ()
    pad_to_multiple_of: int | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """Every reference that is named, once."""
        named = [] if self.source in (UNION, BASE) else [self.source]
        named += [c.source.model for c in self.tokens if isinstance(c.source, ModelToken)]
        return tuple(dict.fromkeys(named))

    def to_value(self) -> dict[str, Any]:
        """The keys of a recipe that say this."""
        if not self.tokens and self.pad_to_multiple_of is None:
            return {"tokenizer_source": self.source}
        value: dict[str, Any] = {"source": self.source}
        if self.tokens:
            value["tokens"] = {choice.token: _write(choice) for choice in self.tokens}
        if self.pad_to_multiple_of is not None:
            value["pad_to_multiple_of"] = self.pad_to_multiple_of
        return {"tokenizer": value}


def rename(choice: TokenizerChoice, mapping: Mapping[str, str]) -> TokenizerChoice:
    """Replace references; those that `mapping` lacks stay."""
    tokens = tuple(
        replace(c, source=replace(c.source, model=mapping.get(c.source.model, c.source.model)))
        if isinstance(c.source, ModelToken)
        else c
        for c in choice.tokens
    )
    kept = choice.source in (UNION, BASE)
    source = choice.source if kept else mapping.get(choice.source, choice.source)
    return replace(choice, source=source, tokens=tokens)


def read(value: Mapping[str, Any], fault: Fault, reference: Reference) -> TokenizerChoice | None:
    """What the keys `tokenizer_source` and `tokenizer` of a recipe say; None where they say nothing."""
    plain, told = value.get("tokenizer_source"), value.get("tokenizer")
    if told is None:
        source = None if plain is None else _source("tokenizer_source", plain, reference)
        return None if source is None else TokenizerChoice(source=source)
    if plain is not None:
        fault("a recipe has either tokenizer_source or tokenizer")
    if not isinstance(told, dict):
        fault("tokenizer: a mapping with the keys source, tokens and pad_to_multiple_of is needed")
        return None
    for key in told.keys() - {"source", "tokens", "pad_to_multiple_of"}:
        fault(f"tokenizer: {str(key)[:80]}: not supported")
    source = _source("tokenizer: source", told.get("source", UNION), reference)
    tokens = _tokens(told.get("tokens"), fault, reference)
    multiple = told.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or not 1 <= multiple <= MAX_MULTIPLE):
        fault(f"tokenizer: pad_to_multiple_of: a whole number from 1 to {MAX_MULTIPLE} is needed")
        return None
    if source is None:
        return None
    return TokenizerChoice(source=source, tokens=tokens, pad_to_multiple_of=multiple)


def _source(where: str, value: Any, reference: Reference) -> str | None:
    return str(value) if value in (UNION, BASE) else reference(where, value)


def _tokens(value: Any, fault: Fault, reference: Reference) -> tuple[TokenChoice, ...]:
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_RULES:
        fault(f"tokenizer: tokens: a mapping of at most {MAX_RULES} tokens is needed")
        return ()
    read = [_token(token, item, fault, reference) for token, item in value.items()]
    return tuple(choice for choice in read if choice is not None)


def _token(token: Any, value: Any, fault: Fault, reference: Reference) -> TokenChoice | None:
    where = f"tokenizer: tokens: {str(token)[:80]}"
    if not isinstance(token, str) or not 0 < len(token) <= MAX_TOKEN:
        fault(f"{where}: a token is text; quote it")
        return None
    if not isinstance(value, dict) or not value.keys() <= {"source", "force"}:
        fault(f"{where}: a mapping with the keys source and force is needed")
        return None
    force = value.get("force", False)
    if type(force) is not bool:
        fault(f"{where}: force is true or false")
        return None
    told = value.get("source")
    source = None if told is None else _row(f"{where}: source", token, told, fault, reference)
    if source is None and told is not None:
        return None
    return TokenChoice(token=token, source=source, force=force)


def _row(where: str, token: str, value: Any, fault: Fault, reference: Reference) -> ModelToken | str | None:
    if isinstance(value, str):
        model = reference(where, value)
        return None if model is None else ModelToken(model=model, token=token)
    if value == {"kind": ZERO}:
        return ZERO
    if not isinstance(value, dict) or value.get("kind") != "model_token":
        fault(f"{where}: a model, or a mapping with kind: zero or kind: model_token, is needed")
        return None
    named = value.keys() - {"kind", "model"}
    if named not in ({"token"}, {"token_id"}):
        fault(f"{where}: a model_token has the keys model and either token or token_id")
        return None
    model, text, number = (
        reference(f"{where}: model", value.get("model")),
        value.get("token"),
        value.get("token_id"),
    )
    if text is not None and (not isinstance(text, str) or not 0 < len(text) <= MAX_TOKEN):
        fault(f"{where}: token: text is needed; quote it")
        return None
    if text is None and (type(number) is not int or not 0 <= number < MAX_ROWS):
        fault(f"{where}: token_id: a whole number below {MAX_ROWS} is needed")
        return None
    return None if model is None else ModelToken(model=model, token=text, token_id=number)


def _write(choice: TokenChoice) -> dict[str, Any]:
    force = {"force": True} if choice.force else {}
    source = choice.source
    if source is None:
        return force
    if not isinstance(source, ModelToken):
        return {"source": {"kind": source}} | force
    if source.token == choice.token:
        return {"source": source.model} | force
    named = {"token_id": source.token_id} if source.token is None else {"token": source.token}
    return {"source": {"kind": "model_token", "model": source.model} | named} | force
