"""Chat templates: how the messages of a talk become one text, in Jinja.

A recipe names a well-known format, writes a template out, or says `auto`: the one that most models of the
merge have, the first of them where several are as frequent. The formats are written for the Jinja of
transformers, which drops the line break after a tag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from merge_core.errors import CorruptCheckpoint
from merge_core.tokenizer.vocabulary import CONFIG, parse_object

AUTO = "auto"
MAX_TEMPLATE = 1 << 18
FILE = "chat_template.jinja"

# A talk whose first message may be of the system: what the others are, and what that one says.
_SPLIT = (
    "{%- if messages[0].role == 'system' -%}"
    "{%- set system, turns = messages[0].content | trim + '\\n\\n', messages[1:] -%}"
    "{%- else -%}{%- set system, turns = '', messages -%}{%- endif -%}"
)
# They take turns, the user first.
_TURNS = (
    "{%- if turn.role != ('assistant' if loop.index0 % 2 else 'user') -%}"
    "{{- raise_exception('user and assistant take turns, the user first') -}}"
    "{%- endif -%}"
)

TEMPLATES: Mapping[str, str] = {
    "alpaca": (
        "{%- for turn in messages -%}"
        "{%- if turn.role == 'system' -%}{{- turn.content | trim + '\\n\\n' -}}"
        "{%- elif turn.role == 'user' -%}{{- '### Instruction:\\n' + turn.content | trim + '\\n\\n' -}}"
        "{%- elif turn.role == 'assistant' -%}"
        "{{- '### Response:\\n' + turn.content | trim + '\\n\\n' -}}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}"
    ),
    "chatml": (
        "{%- for turn in messages -%}"
        "{{- '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    ),
    "exaone": (
        "{%- if messages[0].role != 'system' -%}{{- '[|system|][|endofturn|]\\n' -}}{%- endif -%}"
        "{%- for turn in messages -%}"
        "{{- '[|' + turn.role + '|]' + turn.content -}}"
        "{{- '\\n' if turn.role == 'user' else '[|endofturn|]\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '[|assistant|]' -}}{%- endif -%}"
    ),
    "gemma": (
        "{{- bos_token -}}" + _SPLIT + "{%- for turn in turns -%}" + _TURNS + "{{- '<start_of_turn>' + "
        "('model' if turn.role == 'assistant' else 'user') + '\\n' -}}"
        "{{- (system if loop.first else '') + turn.content | trim + '<end_of_turn>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"
    ),
    "llama3": (
        "{{- bos_token -}}"
        "{%- for turn in messages -%}"
        "{{- '<|start_header_id|>' + turn.role + '<|end_header_id|>\\n\\n' -}}"
        "{{- turn.content | trim + '<|eot_id|>' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}"
        "{%- endif -%}"
    ),
    "mistral": (
        "{{- bos_token -}}" + _SPLIT + "{%- for turn in turns -%}" + _TURNS + "{%- if turn.role == 'user' -%}"
        "{{- '[INST] ' + (system if loop.first else '') + turn.content + ' [/INST]' -}}"
        "{%- else -%}{{- ' ' + turn.content + eos_token -}}{%- endif -%}"
        "{%- endfor -%}"
    ),
}
"""The formats that a recipe may name."""


def read(value: Any, fault: Callable[[str], None]) -> str | None:
    """What `chat_template` says in a recipe: AUTO, a name, or a template; None where it says nothing."""
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEMPLATE:
        fault(f"chat_template: text of at most {MAX_TEMPLATE} characters is needed")
        return None
    if value != AUTO and value not in TEMPLATES and "{" not in value:
        known = ", ".join((AUTO, *sorted(TEMPLATES)))
        fault(f"chat_template {value[:80]}: not supported; it is one of {known}, or a template in Jinja")
        return None
    return value


def written_out(choice: str, models: Iterable[Callable[[], Mapping[str, bytes]]]) -> str | None:
    """The template that a choice means; `models` give their files, and are asked for AUTO only.

    None where AUTO finds none. Raises CorruptCheckpoint on files that are not what they should be.
    """
    if choice != AUTO:
        return TEMPLATES.get(choice, choice)
    found = [template for template in map(_of, (files() for files in models)) if template]
    # The first of the most frequent ones: max takes the first of equals.
    return max(found, key=found.count, default=None)


def tells_of(choice: str | None, template: str | None) -> bool:
    """Whether a choice tells of the template of a plan; which one AUTO finds depends on files."""
    return choice == AUTO or template == (None if choice is None else TEMPLATES.get(choice, choice))


def _of(files: Mapping[str, bytes]) -> str | None:
    """The template of a model."""
    if FILE in files:
        return _bounded(files[FILE].decode("utf-8", "replace"))
    told = parse_object(CONFIG, files.get(CONFIG, b"{}")).get("chat_template")
    if isinstance(told, list):
        named = [item for item in told if isinstance(item, dict) and item.get("name") == "default"]
        told = named[0].get("template") if named else None
    return _bounded(told) if isinstance(told, str) else None


def _bounded(template: str) -> str:
    if len(template) > MAX_TEMPLATE:
        raise CorruptCheckpoint(
            f"a chat template of {len(template)} characters; at most {MAX_TEMPLATE} are read",
            hint="name one in the recipe: chat_template: chatml",
        )
    return template.strip()
