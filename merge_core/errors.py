"""What can be wrong with models and recipes: one class for each party who must act.

    MergeCoreError
    ├── InvalidRecipe       the author of the recipe must change it
    ├── InvalidTask         the author of the evaluation task must change it, or its name is not known
    ├── Unmergeable         these models do not go together: choose others
    ├── CorruptCheckpoint   the bytes are not what they claim: fetch or export them again
    └── CannotWrite         the disk is full, or something lies where the output belongs: make room

The message is one line of why; `hint` names the next thing to do.
"""

from __future__ import annotations


class MergeCoreError(Exception):
    """Base of everything that merge_core raises on purpose."""

    def __init__(self, why: str, *, hint: str = "") -> None:
        super().__init__(why)
        self.why = why
        self.hint = hint


class InvalidRecipe(MergeCoreError):
    """The recipe says something that cannot be read or is not supported."""


class InvalidTask(MergeCoreError):
    """An evaluation task is not known by its name, or says something that cannot be scored."""


class Unmergeable(MergeCoreError):
    """The models do not fit each other; `problems` lists every incompatibility found."""

    def __init__(self, why: str, *, problems: tuple[str, ...] = (), hint: str = "") -> None:
        super().__init__(why, hint=hint)
        self.problems = problems

    @classmethod
    def of(cls, problems: tuple[str, ...], *, hint: str) -> Unmergeable:
        """What to raise for one problem or more: the first is told, with the number of the others."""
        more = len(problems) - 1
        return cls(problems[0] + (f" (and {more} more)" if more else ""), problems=problems, hint=hint)


class CorruptCheckpoint(MergeCoreError):
    """A file is malformed, truncated, or does not match its digest."""


class CannotWrite(MergeCoreError):
    """The disk or the place does not take a checkpoint."""
