"""From what a recipe says of tokens to the TokenizerPlan of a step, and to the tensors that it concerns.

A caller settles the choice first, which reads the models' tokenizers and says how many rows the output has;
it then names the tensors of the output that have a row for each token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merge_core.checkpoint.layout import may_count_tokens
from merge_core.checkpoint.manifest import MAX_FUNCTIONAL_FILE
from merge_core.checkpoint.source import TensorInfo
from merge_core.config_keys import NESTED, TOKEN_IDS, stated
from merge_core.errors import Unmergeable
from merge_core.tokenizer.choice import BASE, UNION, ModelToken, TokenChoice, TokenizerChoice
from merge_core.tokenizer.plan import FromToken, Rule, TokenizerPlan
from merge_core.tokenizer.union import Files, Tokenizers

_MANY = 1000
_HINT = "name one of the models of the merge, then: weft plan RECIPE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A choice with nothing left open but its tensors; `warnings` are for the person to judge."""

    plan: TokenizerPlan
    warnings: tuple[str, ...]


def token_tensors(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> frozenset[str]:
    """The tensors of a model that have one row for each token: the embedding, the head and its bias."""
    rows = stated(config, "vocab_size")
    return frozenset(
        name for name, info in tensors.items() if info.shape[:1] == (rows,) and may_count_tokens(name)
    )


def settle(
    choice: TokenizerChoice,
    models: Mapping[str, int],
    base: int | None,
    files: Sequence[Files],
) -> Settled:
    """Read the tokenizers of a merge; `files` are those of all sources.

    `models` gives the source of each reference, the donor first; `base` is the source whose rows are taken
    before averages. Raises Unmergeable or CorruptCheckpoint where the tokenizers do not go together.
    """
    from merge_core.tokenizer.rows import Owner, map_rows

    for model in choice.models:
        if model not in models:
            raise Unmergeable(f"tokenizer: {model} is not one of the models that are merged", hint=_HINT)
    plan = _unread(choice, models)
    tokenizers = Tokenizers(plan, files, {number: model for model, number in models.items()})
    multiple = choice.pad_to_multiple_of or 1
    plan = replace(plan, rows=-(-tokenizers.rows // multiple) * multiple)
    owners = [Owner(source=m, tokens=tokenizers.of(m).ids, rows=tokenizers.rows_of(m)) for m in plan.models]
    # Raises now what would be raised when the rows are gathered.
    map_rows(tokenizers.vocabulary.ids, plan.rows, owners, base, plan.rules)
    if any(len(data) > MAX_FUNCTIONAL_FILE for data in tokenizers.files.values()):
        raise Unmergeable(
            f"the tokenizer of the output would have more than {MAX_FUNCTIONAL_FILE} bytes",
            hint="tokenizer_source: base, then: weft plan RECIPE",
        )
    return Settled(plan=plan, warnings=tuple(_warnings(tokenizers, plan, models)))


def tells_of(choice: TokenizerChoice | None, plan: TokenizerPlan | None, models: Mapping[str, int]) -> bool:
    """Whether a choice over models, the donor first, tells of a plan; the number of rows depends on files."""
    if choice is None or plan is None:
        return choice is None and plan is None
    if not models.keys() >= set(choice.models) or plan.rows % (choice.pad_to_multiple_of or 1):
        return False
    return _unread(choice, models) == replace(plan, rows=1, tensors=())


def config_changes(plan: TokenizerPlan, donor: Mapping[str, Any], giver: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the donor's config that change with its tokens, and their values.

    `giver` is the config of the model whose tokenizer it is: the tokens that a model names by id are its.
    """
    changed = {key: giver[key] for key in TOKEN_IDS if key in giver and giver[key] != donor.get(key)}
    is_nested = "vocab_size" not in donor and isinstance(donor.get(NESTED), Mapping)
    return changed | {f"{NESTED}.vocab_size" if is_nested else "vocab_size": plan.rows}


def _unread(choice: TokenizerChoice, models: Mapping[str, int]) -> TokenizerPlan:
    """What a choice says without a look into the tokenizers: nothing of rows and tensors."""
    first, *_ = ordered = tuple(models.values())
    sources = {UNION: None, BASE: first}
    return TokenizerPlan(
        source=sources[choice.source] if choice.source in sources else models[choice.source],
        models=ordered,
        rows=1,
        tensors=(),
        rules=tuple(_rule(token, models) for token in choice.tokens),
    )


def _rule(choice: TokenChoice, models: Mapping[str, int]) -> Rule:
    fill: FromToken | str | None = None
    if isinstance(choice.source, ModelToken):
        row = choice.source
        fill = FromToken(source=models[row.model], token=row.token, row=row.token_id)
    else:
        fill = choice.source
    return Rule(token=choice.token, fill=fill, force=choice.force)


def _warnings(tokenizers: Tokenizers, plan: TokenizerPlan, models: Mapping[str, int]) -> list[str]:
    output = tokenizers.vocabulary
    lacking = {
        model: len(output.ids.keys() - tokenizers.of(number).ids.keys()) for model, number in models.items()
    }
    warnings = [
        f"{model} lacks {count} of the {len(output.ids)} tokens: their rows are filled from the other models"
        for model, count in lacking.items()
        if count
    ]
    added = len(output.added) - len(tokenizers.of(plan.donor).added)
    if added > _MANY:
        warnings.append(
            f"{added} tokens are added to a tokenizer that did not learn them: text is cut at each"
        )
    return warnings
