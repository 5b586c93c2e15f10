"""The journal of a running merge: JSON lines of what is finished, so that a killed run can go on.

    {"plan": "sha256:…", "version": 2}
    {"leaves": "…", "squares": ["0x1.8p+3", …], "tensor": "lm_head.weight", "trace": {}}

It makes no promise about the disk: a resumed run hashes what a line claims before it believes it. So no fsync
is needed, and a line that was cut short is simply the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from merge_core.checkpoint.merkle import DIGEST_SIZE, leaf_count
from merge_core.digest import canonical
from merge_core.operators.base import Traced
from merge_core.plan import MergePlan
from merge_core.trace import read_values, write_values

_HEX = re.compile(r"(?:[0-9a-f]{64})+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A tensor that was written whole: its leaf digests in order, what was traced, and its Norms' squares."""

    leaves: tuple[bytes, ...]
    traced: Traced
    squares: tuple[float, ...] = ()


class Journal:
    """An open journal of one plan; a context manager that closes the file.

    `finished` is what earlier runs claim; opening cuts off a torn last line, and everything if the file
    belongs to another plan or `fresh` says that nothing of the output is left.
    """

    def __init__(self, path: Path, plan: MergePlan, *, fresh: bool) -> None:
        self._tensors = {t.name: t for t in plan.tensors}
        self._head = canonical({"version": 2, "plan": plan.digest}) + b"\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("r+b" if path.exists() and not fresh else "w+b")
        self.finished: Mapping[str, Finished] = self._load()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, tensor: str, finished: Finished) -> None:
        """Append a finished tensor; it outlives the process from here on."""
        leaves, trace = b"".join(finished.leaves).hex(), canonical(write_values(finished.traced)).decode()
        squares = ",".join(f'"{value.hex()}"' for value in finished.squares)
        # Spelled here, since no name of a tensor needs care: models have many tensors.
        line = f'{{"leaves":"{leaves}","squares":[{squares}],"tensor":"{tensor}","trace":{trace}}}\n'
        self._file.write(line.encode())
        self._file.flush()

    def _load(self) -> dict[str, Finished]:
        finished: dict[str, Finished] = {}
        good = 0
        if self._file.readline(len(self._head) + 1) == self._head:
            good = len(self._head)
            for line in self._file:
                try:
                    name, entry = self._entry(line)
                except (ValueError, TypeError, KeyError, RecursionError):
                    break
                finished[name] = entry
                good += len(line)
        self._file.seek(good)
        self._file.truncate()
        if good == 0:
            self._file.write(self._head)
            self._file.flush()
        return finished

    def _entry(self, line: bytes) -> tuple[str, Finished]:
        if not line.endswith(b"\n"):
            raise ValueError("a torn line")
        value: Any = json.loads(line)
        tensor = self._tensors[value["tensor"]]
        if not _HEX.fullmatch(value["leaves"]):
            raise ValueError("leaf digests")
        digests = bytes.fromhex(value["leaves"])
        leaves = tuple(digests[i : i + DIGEST_SIZE] for i in range(0, len(digests), DIGEST_SIZE))
        if len(leaves) != leaf_count(tensor.info.length):
            raise ValueError("the number of leaves")
        squares = tuple(map(float.fromhex, value["squares"]))
        if len(squares) not in (0, 1 + len(tensor.operands)) or not all(square >= 0 for square in squares):
            raise ValueError("sums of squares")
        return tensor.name, Finished(
            leaves=leaves, traced=read_values(tensor, value["trace"]), squares=squares
        )
