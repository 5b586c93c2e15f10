"""What a recipe's `model:` may say: a directory, a hub id, a model id, a peer's model, a catalogue's name.

./experts/math                      a directory on this machine
org/name, org/name@revision         a model that was downloaded from the hub, in the cache of its tools
sha256:…                            a model id, whoever holds it
peer://12D3KooW…/sha256:…           a model id, from one peer
math-expert                         a name that the catalogue knows exactly once
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from merge_core.digest import ModelId
from merge_core.errors import InvalidRecipe
from merge_core.recipe import Recipe, rename
from node.domain.ids import PeerId
from node.errors import NotEnoughPeers
from node.merging import hub

_PEER = "peer://"


@dataclass(frozen=True, slots=True)
class LocalDirectory:
    """A directory on this machine, absolute."""

    path: Path


@dataclass(frozen=True, slots=True)
class Published:
    """A model by its id, from one peer when `peer` names it."""

    model_id: ModelId
    peer: PeerId | None = None


@dataclass(frozen=True, slots=True)
class Named:
    """A name in the catalogue."""

    name: str


Reference = LocalDirectory | Published | Named


def parse_reference(text: str, folder: Path | None) -> Reference:
    """Read one reference; what looks like a path is one, relative to `folder`. Raises InvalidRecipe.

    Without a folder only absolute paths are paths: a node's own working directory means nothing to a recipe.
    """
    try:
        if text.startswith(_PEER):
            peer, _, model = text.removeprefix(_PEER).partition("/")
            return Published(ModelId(model), PeerId(peer))
        if text.startswith("sha256:"):
            return Published(ModelId(text))
    except ValueError as error:
        raise InvalidRecipe(f"{text[:120]}: {error}", hint="weft search") from error
    path = Path(text).expanduser()
    if folder is not None:
        path = folder.absolute() / path
    if path.is_absolute() and (path.is_dir() or text.startswith((".", "/", "~"))):
        return LocalDirectory(_short(path.absolute()))
    hub_model = hub.parse(text)
    cached = hub.find(hub_model) if hub_model else None
    if cached is not None:
        return LocalDirectory(cached.absolute())
    if text.startswith("."):
        raise InvalidRecipe(f"{text[:120]} is relative to nothing here", hint="give an absolute path")
    return Named(text)


def _short(path: Path) -> Path:
    """A path without `..`, unless a link in it makes that another place."""
    plain = Path(os.path.normpath(path))
    return plain if plain.resolve() == path.resolve() else path


def is_local(recipe: Recipe, folder: Path) -> bool:
    """Whether every model of the recipe is a directory on this machine: then no node is needed."""
    return all(isinstance(parse_reference(model, folder), LocalDirectory) for model in recipe.models)


def nowhere_here(reference: str) -> NotEnoughPeers:
    """The error for a model that is not on this machine where no node is asked, with what brings it here."""
    model = hub.parse(reference)
    if model is not None:
        return NotEnoughPeers(f"{reference} is not in the Hugging Face cache", hint=model.download)
    return NotEnoughPeers(
        f"{reference} is not on this machine", hint="weft up -d, so that it is fetched; then again"
    )


def refuse_undownloaded(recipe: Recipe, folder: Path) -> None:
    """Raise NotEnoughPeers for the first hub id that is not in the cache."""
    for model in recipe.models:
        if isinstance(parse_reference(model, folder), Named) and hub.parse(model):
            raise nowhere_here(model)


def absolute(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with every local directory spelled absolutely, as another process can read it.

    Raises InvalidRecipe where one of its merges is called as a directory here: which one is meant?
    """
    for name in sorted(recipe.names):
        if (folder / name).is_dir():
            raise InvalidRecipe(
                f"{name} is a merge of this recipe and a directory here", hint="give the merge another name"
            )
    return rename(recipe, _absolute_names(recipe, folder))


def _absolute_names(recipe: Recipe, folder: Path) -> Mapping[str, str]:
    references = {model: parse_reference(model, folder) for model in recipe.models}
    return {m: str(r.path) for m, r in references.items() if isinstance(r, LocalDirectory)}
