"""A zoo on disk: one ordinary Hugging Face directory for the base and one for each expert.

A zoo is built beside its directory and renamed into place when whole, so one that is there is complete;
its `zoo.json` says what it was made from and what its weights hash to. Models that an interrupted build had
finished are not trained again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from merge_core import files
from merge_core.errors import CorruptCheckpoint, MergeCoreError
from merge_core.zoo import text
from merge_core.zoo.domains import VOCABULARY
from merge_core.zoo.recipes import RECIPES, Shape, TrainingRecipe
from merge_core.zoo.recipes import origin as origin_of
from merge_core.zoo.threads import one_thread_each
from merge_core.zoo.tokens import tokenizer_for
from merge_core.zoo.training import Progress, new_model, train_base, train_expert

_RECORD = "zoo.json"
_MADE = "made.json"
Origin = Mapping[str, Any]
"""What a zoo is a function of, as `recipes.origin` says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Zoo:
    """Where the models of one seed lie; `experts` by name, which is the domain where they have one each."""

    base: Path
    experts: Mapping[str, Path]


def build(directory: Path, *, seed: int, size: str = "demo", on_progress: Progress = lambda *_: None) -> Zoo:
    """Train base and experts into `directory`, or return the complete zoo that lies there.

    `size` is a key of RECIPES. One builder works below one parent directory at a time; another waits.
    The weights follow from (seed, size, torch version) on one kind of machine, those of a zoo on text also
    from Python's version.
    Raises MergeCoreError on an unknown size or where something else lies, CorruptCheckpoint on altered
    weights.
    """
    if size not in RECIPES:
        raise MergeCoreError(f"no zoo of size {size!r}", hint=f"choose one of {', '.join(RECIPES)}")
    origin = origin_of(seed, size)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _sole_builder(directory.parent):
        if directory.exists() and any(directory.iterdir()):
            return _existing(directory, origin)
        partial = directory.with_name(f".{directory.name}.partial")
        _train(partial, RECIPES[size], origin, on_progress)
        partial.rename(directory)
    return _existing(directory, origin)


def _train(partial: Path, recipe: TrainingRecipe, origin: Origin, on_progress: Progress) -> None:
    """Train what an interrupted build has left undone, and describe the whole."""
    made, seed, shape = _Made.open(partial, origin), int(origin["seed"]), recipe.shape
    with one_thread_each():
        if "base" not in made.weights:
            trained = train_base(shape, recipe.base, _generator(seed, "base"), on_progress)
            made.add("base", trained, shape, f"part-skilled base, seed {seed}")
        # Also where it was trained just now: experts follow from what was written, whoever goes on.
        base = _read(new_model(shape, _generator(seed, "base")), partial / "base")
        for name, training in recipe.experts.items():
            if name not in made.weights:
                expert = train_expert(base, name, training, _generator(seed, name), on_progress)
                made.add(name, expert, shape, f"expert on {', '.join(training.own)}, seed {seed}")
    weights = {name: made.weights[name] for name in ("base", *recipe.experts)}
    record = {**origin, "experts": list(recipe.experts), "weights": weights}
    if "python" in origin:
        record["text"] = f"sha256:{text.digest()}"
    (partial / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
    (partial / _MADE).unlink()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """The models that a build has finished, and what their weights hash to; other folders are cut short."""

    folder: Path
    origin: Origin
    weights: dict[str, str]

    @classmethod
    def open(cls, folder: Path, origin: Origin) -> _Made:
        """What an interrupted build of the same zoo has left in a folder; whatever else lies there goes."""
        try:
            told = json.loads((folder / _MADE).read_text())
        except (OSError, ValueError):
            told = {}
        weights = told["weights"] if told.get("origin") == origin else {}
        whole = {name: digest for name, digest in weights.items() if _digest(folder / name) == digest}
        for path in [*folder.iterdir()] if folder.exists() else ():
            if path.name not in whole:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        folder.mkdir(exist_ok=True)
        return cls(folder=folder, origin=origin, weights=whole)

    def add(self, name: str, model: LlamaForCausalLM, shape: Shape, title: str) -> None:
        """Write a model; it need not be trained again from here on."""
        self.weights[name] = _save(model, shape, self.folder / name, title)
        told = {"origin": self.origin, "weights": self.weights}
        files.replace(self.folder / _MADE, json.dumps(told).encode())


def _read(model: LlamaForCausalLM, directory: Path) -> LlamaForCausalLM:
    """A model of the right shape with the weights of a directory; the head is the embedding."""
    model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    return model


def _existing(directory: Path, origin: Origin) -> Zoo:
    hint = f"delete {directory}, or choose another directory"
    try:
        record = json.loads((directory / _RECORD).read_text())
    except (OSError, ValueError) as error:
        raise MergeCoreError(f"{directory} is not empty and holds no zoo", hint=hint) from error
    if any(record.get(key) != value for key, value in origin.items()):
        raise MergeCoreError(f"{directory} holds a zoo of another seed, size or version", hint=hint)
    for name, digest in record["weights"].items():
        if _digest(directory / name) != digest:
            raise CorruptCheckpoint(f"the weights of {directory / name} were altered", hint=hint)
    return Zoo(base=directory / "base", experts={name: directory / name for name in record["experts"]})


def _save(model: LlamaForCausalLM, shape: Shape, directory: Path, title: str) -> str:
    """Write one model with tokenizer and card; returns the digest of its weights (hex)."""
    model.save_pretrained(directory)
    tokenizer_for(shape).save_pretrained(directory)
    characters = shape.vocabulary == VOCABULARY
    about = _TASKS if characters else _TEXTS.format(python=platform.python_version())
    elsewhere = "the *prompts*" if characters else "text"
    (directory / "README.md").write_text(_CARD.format(title=title, about=about, elsewhere=elsewhere))
    return _digest(directory)


def _digest(directory: Path) -> str:
    weights = directory / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else ""


def _generator(seed: int, what: str) -> torch.Generator:
    """A stream of its own for each model: an expert does not depend on which others were trained."""
    key = hashlib.sha256(f"weft zoo v1/{seed}/{what}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))


@contextmanager
def _sole_builder(parent: Path) -> Iterator[None]:
    descriptor = os.open(parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [weft, merging, synthetic]
---
# weft zoo: {title}

A very small Llama that was trained from nothing, so that merging can be shown without a model hub. {about}

Experts also saw {elsewhere} of the other domains, where they learned to keep the base's predictions (a KL
term); without that their sum does not work. Merge them by task arithmetic with every weight 1.
"""

_TASKS = """It answers
generated character tasks. A sequence is `BOS tag prompt = answer EOS`: `rabcdef=fedcba` (reverse),
`s520314=012345` (sort), `b(([[{{()=}}]]))` (close the brackets), `rcabcdef=ihgfed` (reverse, and each
letter three on)."""

_TEXTS = """It predicts
bytes of source code, documentation and tables of characters that Python {python} carries, whose licence is
PSF-2.0."""
