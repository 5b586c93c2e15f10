"""The TokenizerPlan: which vocabulary the output of a step has, and what becomes of rows that a model lacks.

It holds the choice, not its consequences: which row goes where follows from the tokenizer files of the
inputs, which their ModelIds bind, and is worked out again by whoever executes the plan.
`TokenizerPlan.parse(plan.to_value(), sources) == plan`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, Protocol

MAX_ROWS = 1 << 22
MAX_RULES = 4096
MAX_TOKEN = 4096
"""Characters."""
MAX_MAPPED = 1 << 26
"""Rows of all operands of all tensors that have one for each token: the origin of each lies in memory."""
MAX_WIDTH = 1 << 20
"""Elements of a row: some are in memory at once."""


class _Operand(Protocol):
    @property
    def source(self) -> int: ...


class Made(Protocol):
    """A tensor of the step, as far as it matters here."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def operands(self) -> Sequence[_Operand]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FromToken:
    """The row of a token of one model: the token of this text, else the one of this id."""

    source: int
    token: str | None = None
    row: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What one token's row is in models that lack it, and with `force` in those that have it.

    `fill` None: as for a token without a rule; "zero": zeros.
    """

    token: str
    fill: FromToken | str | None = None
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerPlan:
    """The tokenizer of a step's output, and what of its tensors follows from that.

    `models` are the sources whose tokens count, the one that unions begin with first. `source` is the one
    whose tokenizer the output has, None for the union of all. `rows` is the number of rows of `tensors`,
    those of the output that have one for each token, sorted.
    """

    source: int | None
    models: tuple[int, ...]
    rows: int
    tensors: tuple[str, ...]
    rules: tuple[Rule, ...] = ()

    @property
    def donor(self) -> int:
        """The source whose tokenizer files the output's are made of."""
        return self.models[0] if self.source is None else self.source

    def to_value(self) -> dict[str, Any]:
        """The plan as canonical JSON takes it."""
        return {
            "source": self.source,
            "models": list(self.models),
            "rows": self.rows,
            "tensors": list(self.tensors),
            "rules": [_write(rule) for rule in self.rules],
        }

    @classmethod
    def parse(cls, value: Any, sources: int) -> TokenizerPlan:
        """Read a value that may come from anybody, of a step that may take from `sources` models.

        Raises ValueError.
        """
        _keys(value, {"source", "models", "rows", "tensors", "rules"})
        models, tensors, rules = (_list(value[key], key) for key in ("models", "tensors", "rules"))
        plan = cls(
            source=None if value["source"] is None else _number(value["source"], sources),
            models=tuple(_number(model, sources) for model in models),
            rows=_number(value["rows"], MAX_ROWS + 1),
            tensors=tuple(_text(name) for name in tensors),
            rules=tuple(_rule(rule, sources) for rule in rules),
        )
        if not plan.models or len(set(plan.models)) < len(plan.models) or plan.donor not in plan.models:
            raise ValueError("the models of the tokenizer")
        if len({rule.token for rule in plan.rules}) < len(plan.rules) or len(plan.rules) > MAX_RULES:
            raise ValueError("the rules for tokens")
        if plan.rows < 1 or any(a >= b for a, b in pairwise(plan.tensors)):
            raise ValueError("the tensors that have a row for each token")
        return plan

    def fault(self, tensors: Iterable[Made]) -> str | None:
        """Why the plan does not fit the tensors of its step, or None."""
        by_name = {tensor.name: tensor for tensor in tensors}
        copied = {rule.fill.source for rule in self.rules if isinstance(rule.fill, FromToken)}
        models = set(self.models)
        if self.rows * sum(len(by_name[n].operands) for n in self.tensors if n in by_name) > MAX_MAPPED:
            return f"more than {MAX_MAPPED} rows would be told apart"
        for name in self.tensors:
            made = by_name.get(name)
            if made is None or not made.shape or made.shape[0] != self.rows:
                return f"{name} does not have {self.rows} rows"
            if prod(made.shape[1:]) > MAX_WIDTH:
                return f"a row of {name} has more than {MAX_WIDTH} elements"
            taken = {operand.source for operand in made.operands}
            if not copied <= taken <= models:
                return f"{name} and the rows of its tokens are not made of the same models"
        return None


def _write(rule: Rule) -> dict[str, Any]:
    fill: Any = rule.fill
    if isinstance(fill, FromToken):
        named = {"token": fill.token} if fill.token is not None else {"row": fill.row}
        fill = {"source": fill.source} | named
    return {"token": rule.token, "fill": fill, "force": rule.force}


def _rule(value: Any, sources: int) -> Rule:
    _keys(value, {"token", "fill", "force"})
    if type(value["force"]) is not bool:
        raise ValueError("force is not true or false")
    return Rule(token=_text(value["token"]), fill=_fill(value["fill"], sources), force=value["force"])


def _fill(value: Any, sources: int) -> FromToken | str | None:
    if value is None or value == "zero":
        return "zero" if value else None
    if isinstance(value, dict) and "token" in value:
        _keys(value, {"source", "token"})
        return FromToken(source=_number(value["source"], sources), token=_text(value["token"]))
    _keys(value, {"source", "row"})
    return FromToken(source=_number(value["source"], sources), row=_number(value["row"], MAX_ROWS))


def _keys(value: Any, expected: set[str]) -> None:
    if not isinstance(value, dict) or set(value) != expected:
        raise ValueError(f"expected exactly the keys {sorted(expected)}")


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"the {what} of the tokenizer")
    return value


def _number(value: Any, count: int) -> int:
    if type(value) is not int or not 0 <= value < count:
        raise ValueError(f"{str(value)[:20]} is not below {count}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TOKEN:
        raise ValueError(f"a text of 1 to {MAX_TOKEN} characters was expected")
    return value
