"""The ModelHeader: what is known of a model without its weights, be it here, elsewhere, or not made yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge_core.checkpoint.manifest import FileRecord, Manifest
from merge_core.checkpoint.reader import Checkpoint, file_record, read_recorded
from merge_core.checkpoint.source import TensorInfo
from merge_core.config_keys import stated
from merge_core.errors import CorruptCheckpoint
from merge_core.functional import output_config, step_files
from merge_core.plan import Step
from merge_core.tokenizer.union import Files


def absent() -> Mapping[str, bytes]:
    """Raise CorruptCheckpoint: the files of a model that are not at hand."""
    raise CorruptCheckpoint("its tokenizer is not here yet", hint="weft get MODEL, then: weft plan RECIPE")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelHeader:
    """The tensors, the parsed config.json, and the records of config, tokenizer and chat template.

    `contents` gives those files themselves, or raises CorruptCheckpoint where they are not at hand.
    """

    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    files: tuple[FileRecord, ...]
    contents: Files = field(default=absent, compare=False, repr=False)

    def stated(self, key: str) -> Any:
        """What the config says of a key; None where it says nothing."""
        return stated(self.config, key)


def header_of(checkpoint: Checkpoint) -> ModelHeader:
    """The header of a checkpoint on disk; `contents` are read again when they are asked for."""
    path = checkpoint.path
    records = tuple(file_record(name, data) for name, data in checkpoint.functional_files().items())
    return ModelHeader(
        tensors=checkpoint.tensors,
        config=checkpoint.config,
        files=records,
        contents=lambda: read_recorded(path, records),
    )


def header_of_manifest(manifest: Manifest, config: Mapping[str, Any]) -> ModelHeader:
    """The header of a model that lies elsewhere; `config` is its parsed config.json."""
    tensors = {t.name: TensorInfo(dtype=t.dtype, shape=t.shape) for t in manifest.tensors}
    return ModelHeader(tensors=tensors, config=config, files=manifest.files)


def header_of_step(step: Step, files: Sequence[Files], donor: ModelHeader) -> ModelHeader:
    """The header of what a step will make; `files` are those of every source that it may take from."""
    contents = step_files(step, files)
    records = donor.files
    if step.tokenizer is not None:
        records = tuple(file_record(name, data) for name, data in contents().items())
    return ModelHeader(
        tensors=step.layout, config=output_config(donor.config, step), files=records, contents=contents
    )
