"""A zoo on disk: one ordinary Hugging Face directory for the base and one for each expert.

A zoo is built beside its directory and renamed into place when whole, so one that is there is complete;
its `zoo.json` says what it was made from and what its weights hash to.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, processors
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from merge_core.errors import CorruptCheckpoint, MergeCoreError
from merge_core.zoo.domains import BOS, EOS, FIRST_CHARACTER, PAD, VOCABULARY
from merge_core.zoo.threads import one_thread_each
from merge_core.zoo.training import RECIPES, Progress, TrainingRecipe, train_base, train_expert

_RECORD = "zoo.json"
_VERSION = 1
Origin = Mapping[str, int | str]
"""What a zoo is a function of: version, seed, size, torch."""
_SPECIAL = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Zoo:
    """Where the models of one seed lie; `experts` by domain."""

    base: Path
    experts: Mapping[str, Path]

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that there is an expert for, in training order."""
        return tuple(self.experts)


def build(directory: Path, *, seed: int, size: str = "demo", on_progress: Progress = lambda *_: None) -> Zoo:
    """Train base and experts into `directory`, or return the complete zoo that lies there.

    `size` is a key of RECIPES. One builder works below one parent directory at a time; another waits.
    The weights follow from (seed, size, torch version) on one kind of machine.
    Raises MergeCoreError on an unknown size or where something else lies, CorruptCheckpoint on altered
    weights.
    """
    if size not in RECIPES:
        raise MergeCoreError(f"no zoo of size {size!r}", hint=f"choose one of {', '.join(RECIPES)}")
    torch_version = str(torch.__version__)
    origin: Origin = {"version": _VERSION, "seed": seed, "size": size, "torch": torch_version}
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _sole_builder(directory.parent):
        if directory.exists() and any(directory.iterdir()):
            return _existing(directory, origin)
        partial = directory.with_name(f".{directory.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            _train(partial, RECIPES[size], origin, on_progress)
            partial.rename(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return _existing(directory, origin)


def _train(directory: Path, recipe: TrainingRecipe, origin: Origin, on_progress: Progress) -> None:
    seed = int(origin["seed"])
    with one_thread_each():
        base = train_base(recipe, _generator(seed, "base"), on_progress)
        weights = {"base": _save(base, directory / "base", f"part-skilled base, seed {seed}")}
        for domain in recipe.domains:
            expert = train_expert(base, domain, recipe, _generator(seed, domain), on_progress)
            weights[domain] = _save(expert, directory / domain, f"expert on {domain}, seed {seed}")
    record = {**origin, "domains": list(recipe.domains), "weights": weights}
    (directory / _RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _existing(directory: Path, origin: Origin) -> Zoo:
    hint = f"delete {directory}, or choose another directory"
    try:
        record = json.loads((directory / _RECORD).read_text())
    except (OSError, ValueError) as error:
        raise MergeCoreError(f"{directory} is not empty and holds no zoo", hint=hint) from error
    if any(record.get(key) != value for key, value in origin.items()):
        raise MergeCoreError(f"{directory} holds a zoo of another seed, size or torch", hint=hint)
    for name, digest in record["weights"].items():
        if _digest(directory / name) != digest:
            raise CorruptCheckpoint(f"the weights of {directory / name} were altered", hint=hint)
    return Zoo(base=directory / "base", experts={name: directory / name for name in record["domains"]})


def _save(model: LlamaForCausalLM, directory: Path, title: str) -> str:
    """Write one model with tokenizer and card; returns the digest of its weights (hex)."""
    model.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    (directory / "README.md").write_text(_CARD.format(title=title))
    return _digest(directory)


def _digest(directory: Path) -> str:
    weights = directory / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else ""


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; others are dropped."""
    characters = {chr(FIRST_CHARACTER + i): i + 3 for i in range(VOCABULARY - 3)}
    tokenizer = Tokenizer(models.BPE(vocab={**_SPECIAL, **characters}, merges=[]))
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def _generator(seed: int, what: str) -> torch.Generator:
    """A stream of its own for each model: an expert does not depend on which others were trained."""
    key = hashlib.sha256(f"weft zoo v{_VERSION}/{seed}/{what}".encode()).digest()
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

A very small Llama that was trained from nothing on generated character tasks, so that merging can be shown
without a model hub. A sequence is `BOS tag prompt = answer EOS`: `rabcdef=fedcba` (reverse), `s520314=012345`
(sort), `b(([[{{{{()=}}}}]]))` (close the brackets), `wqrstuv=rqtsvu` (swap neighbours).

Experts also saw the prompts of the other domains, where they learned to keep the base's predictions (a KL
term); without that their sum does not work. Merge them by task arithmetic with every weight 1.
"""
