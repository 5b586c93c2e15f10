"""Keeps the library's logging out of ours."""

from __future__ import annotations

import logging
import os


def quieten() -> None:
    """Keep libp2p out of stderr and out of the root logger; LIBP2P_DEBUG turns its own logging on."""
    if not os.environ.get("LIBP2P_DEBUG"):
        for name in [name for name in logging.root.manager.loggerDict if name.startswith("libp2p.")]:
            logging.getLogger(name).setLevel(logging.NOTSET)  # some modules set a level of their own
        logger = logging.getLogger("libp2p")
        logger.setLevel(logging.CRITICAL)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
    root = logging.getLogger()
    if _not_libp2p not in root.filters:
        root.addFilter(_not_libp2p)
    if not root.handlers:
        # The functions of the logging module install a handler on stderr when there is none.
        root.addHandler(logging.NullHandler())


def _not_libp2p(record: logging.LogRecord) -> bool:
    """Drop what libp2p says through the root logger itself; loggers with a name, as ours, are not asked."""
    return f"{os.sep}libp2p{os.sep}" not in record.pathname
