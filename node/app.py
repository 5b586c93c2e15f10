"""The composition root: the only module that knows every service, and how they are put together.

Verbs that need no node call the functions here; `weft up` runs the daemon that is built from the same parts.
Services are imported where they are put together: `weft --help` loads none of them.
"""

from __future__ import annotations

from node.home import Home
from node.identity import keyring
from node.identity.keyring import Identity


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
