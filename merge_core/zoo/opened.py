"""Models on the disk as merges in memory take them: headers, ids, and weights that are mapped once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from merge_core.checkpoint.reader import Checkpoint, measure
from merge_core.evolution.evaluator import Model
from merge_core.evolution.mapped import MappedSource
from merge_core.execute import Material
from merge_core.resolve import header_of


@contextmanager
def opened(directories: Mapping[str, Path]) -> Iterator[dict[str, Model]]:
    """The models in these directories, hashed; their weights can be read until the block ends.

    Raises CorruptCheckpoint where a directory holds no sound model.
    """
    with ExitStack() as stack:
        models = {}
        for name, directory in directories.items():
            checkpoint = stack.enter_context(Checkpoint.open(directory))
            measured = measure(checkpoint)
            models[name] = Model(
                header=header_of(checkpoint),
                model_id=measured.manifest.model_id,
                material=Material(
                    tensors=MappedSource(checkpoint, measured.leaves), files=checkpoint.functional_files
                ),
                directory=directory,
            )
        yield models
