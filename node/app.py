"""The composition root: the only module that knows every service, and how they are put together.

Verbs that need no node call the functions here; `weft up` runs the daemon that is built from the same parts.
Services are imported where they are put together: `weft --help` loads none of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from node.errors import LocalError
from node.home import Home
from node.identity import keyring
from node.identity.keyring import Identity

if TYPE_CHECKING:
    from merge_core.recipe import Recipe
    from node.catalog.hashes import HashCache
    from node.catalog.shelf import Added, Shelf
    from node.jobs.runner import JobView
    from node.merging.merge import Planned


def initialise(home: Home, *, now: float) -> Identity:
    """Make the identity and the configuration of a new node; raises LocalError where there is one."""
    from node import config

    identity = keyring.create(home.identity, now)
    if not home.config.exists():
        config.save(config.load(home.config), home.config)
    return identity


def identity(home: Home) -> Identity:
    """Who this node is; raises LocalError naming `weft init` where it is nobody yet."""
    return keyring.load(home.identity)


def identity_if_any(home: Home) -> Identity | None:
    """Who this node is, None before `weft init`; a damaged identity still raises LocalError."""
    return keyring.load(home.identity) if home.identity.exists() else None


def hashes(home: Home) -> HashCache:
    """What was hashed before on this machine."""
    from node.catalog.hashes import HashCache

    return HashCache(home.cache / "hashes")


def shelf(home: Home) -> Shelf:
    """The experts that this node holds."""
    from node.catalog.shelf import Shelf

    return Shelf(home.experts, hashes=hashes(home))


def add(
    home: Home, directory: Path, *, name: str | None, licence: str | None, on_progress: Callable[[int], None]
) -> Added:
    """Share a checkpoint: hash, sign and fingerprint it, with or without a running node."""
    from node.catalog.sketching import sketch_in_worker

    return shelf(home).add(
        directory,
        identity=identity(home),
        sketch=sketch_in_worker,
        now=time.time(),
        name=name,
        licence=licence,
        on_progress=on_progress,
    )


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file, its directories spelled absolutely from where the user stands."""
    from merge_core import recipe
    from node.merging.references import absolute

    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise LocalError(f"the recipe {path} cannot be read: {why}", hint="weft merge --help") from error
    return absolute(recipe.parse(text), Path.cwd())


def needs_no_node(recipe: Recipe) -> bool:
    """Whether every model of the recipe lies on this machine."""
    from node.merging.references import is_local

    return is_local(recipe, Path.cwd())


def plan_here(home: Home, recipe: Recipe) -> Planned:
    """Resolve a recipe whose models all lie here."""
    from node.merging.merge import Merging
    from node.merging.parents import LocalParents

    merging = Merging(LocalParents(hashes(home), Path.cwd()), None, clock=time.time)
    return asyncio.run(merging.plan(recipe))


def merge_here(
    home: Home, recipe: Recipe, directory: Path, *, resume: bool, on_view: Callable[[JobView], None]
) -> dict[str, Any]:
    """Merge models that all lie here, without a node; signed where there is an identity."""
    from node.merging import local
    from node.merging.merge import Merging
    from node.merging.parents import LocalParents

    merging = Merging(LocalParents(hashes(home), Path.cwd()), identity_if_any(home), clock=time.time)
    return asyncio.run(
        local.merge(merging, recipe, directory.absolute(), resume=resume, clock=time.time, on_view=on_view)
    )
