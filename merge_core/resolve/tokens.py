"""The tokens of a merge where a recipe chooses them: their number, and the tensors with a row for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merge_core.plan import TensorPlan
from merge_core.resolve.header import ModelHeader
from merge_core.tokenizer.choice import TokenizerChoice
from merge_core.tokenizer.plan import TokenizerPlan
from merge_core.tokenizer.resolve import config_changes, settle, token_tensors
from merge_core.tokenizer.union import Files


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A settled choice of tokens over models that are numbered so; `config` is what changes in the donor's.

    `by_model` names the tensors of each model that have a row for each of its own tokens.
    """

    settled: TokenizerPlan
    models: Mapping[str, int]
    by_model: Mapping[str, frozenset[str]]
    config: Mapping[str, Any]
    warnings: tuple[str, ...]

    def plan(self, made: Iterable[str]) -> TokenizerPlan:
        """The plan for these tensors of the output."""
        return replace(self.settled, tensors=tuple(sorted(made)))

    def faults(self, made: Sequence[str], tensors: Sequence[TensorPlan]) -> list[str]:
        """Why these tensors of the output, of all that there are, cannot follow the tokens."""
        if not made:
            return ["no tensor has a row for each token: vocab_size says another number"]
        numbers = {number: model for model, number in self.models.items()}
        wanted = frozenset(made)
        lacking = {
            f"{operand.tensor} of {numbers[operand.source]} has no row for each token, as {name} has"
            for name, operands in ((t.name, t.operands) for t in tensors if t.name in wanted)
            for operand in operands
            if operand.tensor not in self.by_model[numbers[operand.source]]
        }
        fault = self.plan(made).fault(tensors)
        return sorted(lacking) or ([f"tokenizer: {fault}"] if fault else [])


def tokens_of(
    choice: TokenizerChoice,
    models: Mapping[str, int],
    headers: Mapping[str, ModelHeader],
    files: Sequence[Files],
    *,
    base: int | None,
    donor: str,
) -> Tokens:
    """Settle a choice over models that are numbered so; `files` are those of every number.

    Raises Unmergeable or CorruptCheckpoint where the tokenizers do not go together, or are not here.
    """
    settled = settle(choice, {donor: models[donor], **models}, base, files)
    giver = next(model for model, number in models.items() if number == settled.plan.donor)
    return Tokens(
        settled=settled.plan,
        models=models,
        by_model={model: token_tensors(headers[model].tensors, headers[model].config) for model in models},
        config=config_changes(settled.plan, headers[donor].config, headers[giver].config),
        warnings=settled.warnings,
    )
