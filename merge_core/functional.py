"""The files beside the weights of a merged model: config, generation config, tokenizer, chat template.

They come from the donor. JSON that a loader acts on is rebuilt from what is known to be harmless, because a
config can name code to import (`auto_map`), kernels to download or paths to read; tokenizer tables and the
template are copied. The same plan and donor give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from merge_core.checkpoint.manifest import FUNCTIONAL_FILES, MAX_FUNCTIONAL_FILE
from merge_core.checkpoint.reader import MAX_CONFIG
from merge_core.config_keys import CONFIG_KEYS, NESTED
from merge_core.errors import CorruptCheckpoint
from merge_core.plan import MergePlan, Step
from merge_core.recipe import DTYPES
from merge_core.tokenizer import union
from merge_core.tokenizer.union import Files, Tokenizers

_DEPTH = 6
_INNER = f"{NESTED}."
_TEXT = 4096

_GENERATION_REFUSED = frozenset({"auto_map", "custom_generate", "cache_implementation", "compile_config"})
_TOKENIZER_REFUSED = frozenset({"auto_map", "name_or_path"})
_PATHS = ("_file", "_path")
"""How keys of tokenizer_config.json end that loaders open, wherever they lead."""


def result_files(plan: MergePlan, inputs: Sequence[Files]) -> dict[str, bytes]:
    """The functional files of a plan's result from those of its inputs, by name, sorted.

    Raises CorruptCheckpoint where a donor has no config, or one that is not what it should be, and
    Unmergeable where the tokenizers do not go together.
    """
    return dict(source_files(plan, inputs)[-1]())


def source_files(plan: MergePlan, inputs: Sequence[Files]) -> list[Files]:
    """The functional files of everything that a plan's steps take from: its inputs, and what they make."""
    sources = list(inputs)
    for step in plan.steps:
        sources.append(step_files(step, tuple(sources)))
    return sources


def step_files(step: Step, sources: Sequence[Files]) -> Files:
    """The functional files of what a step makes of sources; asking for them raises as `result_files` does."""

    def make() -> dict[str, bytes]:
        given = sources[step.donor]()
        if step.tokenizer is not None:
            others = {name: data for name, data in given.items() if name not in union.FILES}
            given = {**others, **Tokenizers(step.tokenizer, sources).files}
        return output_files(step, given)

    return cache(make)


def output_files(step: Step, donor_files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The functional files that a step makes of its donor's, by name, sorted.

    Raises CorruptCheckpoint where the donor has no config, or one that is not what it should be.
    """
    if "config.json" not in donor_files:
        raise CorruptCheckpoint(
            "the donor has no config.json", hint="export the checkpoint again, then: weft add DIR"
        )
    files = {}
    for name in sorted(set(donor_files).intersection(FUNCTIONAL_FILES)):
        data = donor_files[name]
        if len(data) > MAX_FUNCTIONAL_FILE:
            raise CorruptCheckpoint(f"{name} has {len(data)} bytes; at most {MAX_FUNCTIONAL_FILE} are read")
        if name == "config.json":
            data = _write(output_config(_object(name, data), step))
        elif name == "generation_config.json":
            data = _write(_without(_object(name, data), _GENERATION_REFUSED))
        elif name == "tokenizer_config.json":
            refused = _TOKENIZER_REFUSED | ({"chat_template"} if step.chat_template is not None else set())
            value = _object(name, data)
            refused |= {key for key in value if key.endswith(_PATHS)}
            if refused & value.keys():
                data = _write(_without(value, refused, plain=False))
        files[name] = data
    if step.chat_template is not None:
        files["chat_template.jinja"] = step.chat_template.encode()
    return dict(sorted(files.items()))


def output_config(config: Mapping[str, Any], step: Step) -> dict[str, Any]:
    """The known keys of a donor's config with plain values, as the step changes them.

    A change of a nested config is called text_config.KEY. Its element type stands under the keys that the
    donor uses, else under `torch_dtype`.
    """
    kept = _known({**config, **step.config})
    if isinstance(nested := config.get(NESTED), Mapping):
        inner = {
            key.removeprefix(_INNER): value for key, value in step.config.items() if key.startswith(_INNER)
        }
        kept[NESTED] = _known({**nested, **inner})
    named = next((name for name, short in DTYPES.items() if short == step.dtype), "float64")
    spelled = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return kept | dict.fromkeys(spelled, named)


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key in CONFIG_KEYS and _plain(value)}


def _without(value: Mapping[str, Any], refused: frozenset[str], *, plain: bool = True) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key not in refused and (not plain or _plain(item))}


def _plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is data of bounded depth, without texts that are long."""
    if isinstance(value, dict):
        return depth < _DEPTH and all(_plain(item, depth + 1) for item in value.values())
    if isinstance(value, list):
        return depth < _DEPTH and all(_plain(item, depth + 1) for item in value)
    return not isinstance(value, str) or len(value) <= _TEXT


def _object(name: str, data: bytes) -> dict[str, Any]:
    limit = MAX_CONFIG if name == "config.json" else MAX_FUNCTIONAL_FILE
    try:
        if len(data) > limit:
            raise ValueError(f"{len(data)} bytes; at most {limit} are read")
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"{name}: {error}", hint="export the checkpoint again, then: weft add DIR"
        ) from error
    return value


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"the key {key[:80]!r} occurs twice")
        value[key] = item
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _write(value: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError as error:
        raise CorruptCheckpoint(f"a config holds text that is not Unicode: {error.reason}") from error
