"""How a merge is done where its weights do not tell: threads, memory, a text to predict afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from merge_core.errors import Unmergeable
from merge_core.memory import THREADS, fit
from merge_core.plan import MergePlan
from merge_core.resolve import ModelHeader
from node.errors import LimitReached


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """None leaves it to the engine; `max_memory` is in bytes, `perplexity` the path of a text or empty."""

    threads: int | None = None
    max_memory: int | None = None
    perplexity: str = ""

    def to_json(self) -> dict[str, Any]:
        """The keys of a job's request; those that say nothing are missing."""
        return {key: value for key, value in asdict(self).items() if value}

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> How:
        """What a job's request says."""
        return cls(
            threads=request.get("threads"),
            max_memory=request.get("max_memory"),
            perplexity=request.get("perplexity", ""),
        )

    def fitting(self, plan: MergePlan, headers: tuple[ModelHeader, ...]) -> int:
        """The number of threads; raises LimitReached where one needs more memory than it may take."""
        tensors = [header.tensors for header in headers]
        try:
            return fit(plan.steps, tensors, threads=self.threads or THREADS, limit=self.max_memory)
        except Unmergeable as error:
            raise LimitReached(error.why, hint=error.hint) from error
