"""Harness: tasks of lm-eval by their names, on a model that is open; needs `pip install 'weftmerge[eval]'`.

    Harness.find(("gsm8k",)).measure("gsm8k", model, tokenizer)  ->  [Reading(metric="exact_match", …), …]

lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) asks and judges; here it is given a model, and
its readings are taken. A task is YAML that may name Python functions beside it, which are run: so tasks come
from lm-eval itself and from folders that a person names, never from a path in place of a name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from merge_core.errors import MergeCoreError
from merge_core.evaluation import tasks
from merge_core.evaluation.named import LM_EVAL

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,119}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One metric of lm-eval on one task; `metric` names its filter too where that is not `none`."""

    task: str
    metric: str
    items: int
    value: float
    higher_is_better: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Harness:
    """lm-eval with an index of the tasks that it was asked for.

    `limit` takes the first items; `runs_code` allows tasks that run what the model writes (HumanEval, MBPP).
    """

    index: Any
    limit: int | None = None
    batch_size: int = 64
    runs_code: bool = False

    @classmethod
    def find(cls, names: Sequence[str], folder: Path | None = None, **options: Any) -> Harness:
        """Look tasks up in `folder`, then among lm-eval's own.

        Raises InvalidTask on a task that there is not, ImportError where lm-eval is not installed.
        """
        from lm_eval.tasks import TaskManager

        unknown = missing = [name for name in names if not _NAME.fullmatch(name)]
        for own in (False, True):  # to index lm-eval's thousands of files takes a while
            if not missing and (own or folder is not None):
                index = TaskManager(include_path=folder, include_defaults=own)
                unknown = [name for name in names if name not in index.all_tasks]
                if not unknown:
                    return cls(index=index, **options)
        # Every name is indexed by now, unless one was none that a task may have.
        known = [] if missing else [LM_EVAL + name for name in index.all_tasks]
        raise tasks.unknown(LM_EVAL + unknown[0], known, hint="lm-eval ls tasks")

    def measure(self, name: str, model: Any, tokenizer: Tokenizer) -> list[Reading]:
        """What lm-eval reads of a model at a task, or at the tasks of a group that has no metric of its own.

        Raises MergeCoreError where lm-eval fails, as it does on data that it cannot get.
        """
        if self.runs_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            found = simple_evaluate(
                model=HFLM(
                    pretrained=model,
                    tokenizer=_wrapped(tokenizer, model),
                    batch_size=self.batch_size,
                    trust_remote_code=False,
                ),
                tasks=[name],
                task_manager=self.index,
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=False,
                confirm_run_unsafe_code=self.runs_code,
            )
            return list(_readings(name, dict(found or {})))
        except Exception as error:  # whatever a task's own code, its data or a metric may raise
            why = str(error).strip().splitlines() or [""]
            raise MergeCoreError(
                f"lm-eval fails at {name}: {type(error).__name__}: {why[0][:300]}", hint=_next(error)
            ) from error


def _wrapped(tokenizer: Tokenizer, model: Any) -> Any:
    """The tokenizer as transformers has them, with the tokens that the model's config names."""
    from transformers import PreTrainedTokenizerFast

    def token(key: str) -> str | None:
        found = getattr(model.config, key, None)
        first = found[0] if isinstance(found, list) and found else found
        return tokenizer.id_to_token(first) if type(first) is int else None

    opening, end = token("bos_token_id"), token("eos_token_id")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=opening, eos_token=end, pad_token=token("pad_token_id") or end
    )


def _readings(name: str, found: dict[str, Any]) -> Iterator[Reading]:
    results = found["results"]
    wanted = [name] if any("," in key for key in results.get(name, {})) else sorted(set(results) - {name})
    for task in wanted:
        for key, value in results[task].items():
            metric, _, filtered = key.partition(",")
            number = isinstance(value, int | float) and math.isfinite(value)
            if not number or not filtered or metric.endswith("_stderr"):
                continue
            yield Reading(
                task=task,
                metric=metric if filtered == "none" else f"{metric} ({filtered})",
                items=int(found["n-samples"].get(task, {}).get("effective", 0)),
                value=float(value),
                higher_is_better=found["higher_is_better"].get(task, {}).get(metric) is not False,
            )


def _next(error: Exception) -> str:
    """What to do about a failure of lm-eval, where its words tell."""
    if isinstance(error, ImportError):
        return "pip install 'weftmerge[eval]', and what else the error names"
    words = f"{type(error).__name__} {error}".lower()
    if "offline" in words or "couldn't find" in words or "connection" in words:
        return "the same command with --download, which lets lm-eval fetch its data"
    if "unsafe" in words or "code_eval" in words:
        return "the same command with --run-code, in a sandbox: the task runs what the model writes"
    return "weft eval --help"
