"""The ModelHeader: what is known of a model without its weights, be it here, elsewhere, or not made yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_core.checkpoint.manifest import FileRecord, Manifest
from merge_core.checkpoint.reader import Checkpoint, file_record
from merge_core.checkpoint.source import TensorInfo
from merge_core.functional import output_config
from merge_core.plan import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelHeader:
    """The tensors, the parsed config.json, and the records of config, tokenizer and chat template."""

    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    files: tuple[FileRecord, ...]

    def stated(self, key: str) -> Any:
        """What the config says, or else its text_config; None where neither says anything."""
        nested = self.config.get("text_config")
        return self.config.get(key, nested.get(key) if isinstance(nested, Mapping) else None)


def header_of(checkpoint: Checkpoint) -> ModelHeader:
    """The header of a checkpoint on disk."""
    files = checkpoint.functional_files()
    return ModelHeader(
        tensors=checkpoint.tensors,
        config=checkpoint.config,
        files=tuple(file_record(name, data) for name, data in files.items()),
    )


def header_of_manifest(manifest: Manifest, config: Mapping[str, Any]) -> ModelHeader:
    """The header of a model that lies elsewhere; `config` is its parsed config.json."""
    tensors = {t.name: TensorInfo(dtype=t.dtype, shape=t.shape) for t in manifest.tensors}
    return ModelHeader(tensors=tensors, config=config, files=manifest.files)


def header_of_step(step: Step, donor: ModelHeader) -> ModelHeader:
    """The header of what a step will make; `files` are the donor's, whose config.json will differ."""
    return ModelHeader(tensors=step.layout, config=output_config(donor.config, step), files=donor.files)
