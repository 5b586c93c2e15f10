"""The Manifest: the canonical list of what a checkpoint *does*, and so its name.

It lists tensors and functional files (config, tokenizer, chat template) and nothing else: not signatures,
model card, licence, times, paths, nor how the weights are split into files. Two people who run one plan
therefore get one ModelId. `Manifest.parse(m.to_bytes()) == m`.

The LeafTable beside it holds the digest of every MiB; it proves itself against the manifest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from merge_core.checkpoint import dtypes, merkle
from merge_core.digest import Digest, ModelId, canonical, check_version, parse_bounded, sha256
from merge_core.errors import CorruptCheckpoint

FUNCTIONAL_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""The files beside the weights that change what a model computes; those that exist are in the manifest."""

MAX_TENSORS = 100_000
MAX_FUNCTIONAL_FILE = 64 << 20
MAX_MANIFEST = 32 << 20
"""Bytes: MAX_TENSORS records with names of 200 characters, four times the longest in use."""
MAX_LEAF_TABLE = 64 << 20
"""Bytes: the digests of 2 TiB of weights."""
MAX_DIMENSIONS = 16
TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./\-]{0,511}")

_ROOT = re.compile(r"[0-9a-f]{64}")
_MAX_INTEGER = 2**53 - 1
_MAX_VALUES = MAX_TENSORS * (MAX_DIMENSIONS + 5) + 1000
"""Brackets and commas of MAX_TENSORS records, and some for the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """One tensor: its type, its shape and the root of its bytes (hex)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    root: str

    @property
    def length(self) -> int:
        """Size in bytes."""
        return dtypes.byte_length(self.dtype, self.shape)

    @property
    def leaf_count(self) -> int:
        """Number of 1 MiB leaves."""
        return merkle.leaf_count(self.length)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One functional file."""

    path: str
    size: int
    sha256: Digest


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of; `tensors` and `files` are sorted by name, without repeats."""

    architecture: str
    files: tuple[FileRecord, ...]
    tensors: tuple[TensorRecord, ...]

    @cached_property
    def tensor_set_root(self) -> str:
        """The root over all tensors (hex)."""
        return merkle.tensor_set_root((t.name, bytes.fromhex(t.root)) for t in self.tensors).hex()

    @cached_property
    def model_id(self) -> ModelId:
        """The digest of the canonical bytes."""
        return ModelId(sha256(self.to_bytes()))

    @property
    def size(self) -> int:
        """Bytes of all tensors together."""
        return sum(t.length for t in self.tensors)

    def to_bytes(self) -> bytes:
        """The canonical bytes, whose SHA-256 is the ModelId."""
        return self._encoded

    @cached_property
    def _encoded(self) -> bytes:
        return canonical(
            {
                "version": 1,
                "architecture": self.architecture,
                "files": [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in self.files],
                "tensors": [
                    {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "root": t.root}
                    for t in self.tensors
                ],
                "tensorSetRoot": self.tensor_set_root,
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Read a manifest that may come from anybody; raises CorruptCheckpoint on whatever is not exact."""
        if len(data) > MAX_MANIFEST:
            raise CorruptCheckpoint(f"a manifest of {len(data)} bytes; at most {MAX_MANIFEST} are read")
        try:
            value = parse_bounded(data, max_values=_MAX_VALUES)
            _keys(value, {"version", "architecture", "files", "tensors", "tensorSetRoot"})
            check_version(value["version"], 1, "manifest")
            if len(value["tensors"]) > MAX_TENSORS:
                raise ValueError(f"{len(value['tensors'])} tensors; at most {MAX_TENSORS} are read")
            manifest = cls(
                architecture=_text(value["architecture"], 128),
                files=tuple(_file(item) for item in value["files"]),
                tensors=tuple(_tensor(item) for item in value["tensors"]),
            )
            _sorted([f.path for f in manifest.files])
            _sorted([t.name for t in manifest.tensors])
            if manifest.tensor_set_root != value["tensorSetRoot"]:
                raise ValueError("tensorSetRoot does not belong to the tensors listed")
            # Every field that was not read, and every other spelling, makes a difference here.
            if manifest.to_bytes() != data:
                raise ValueError("it says something else than what was read of it")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CorruptCheckpoint(f"not a manifest: {error}", hint="ask another holder for it") from error
        vars(manifest)["model_id"] = ModelId(sha256(data))  # known now: spare the cached property its work
        return manifest


def files_of(data: bytes) -> tuple[FileRecord, ...]:
    """The functional files of a manifest whose digest is known to be a ModelId; its tensors are not read."""
    return tuple(_file(item) for item in parse_bounded(data, max_values=_MAX_VALUES)["files"])


class LeafTable:
    """The leaf digests of every tensor of one manifest, in leaf order.

    On the wire and on disk: the digests concatenated, tensors in manifest order (32 bytes per MiB).
    """

    def __init__(self, leaves: Mapping[str, Sequence[bytes]]) -> None:
        self._leaves = {name: tuple(digests) for name, digests in leaves.items()}

    def __getitem__(self, tensor: str) -> tuple[bytes, ...]:
        return self._leaves[tensor]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LeafTable) and self._leaves == other._leaves

    __hash__ = None  # type: ignore[assignment]

    def to_bytes(self) -> bytes:
        """The digests of the tensors in name order, concatenated."""
        return b"".join(b"".join(self._leaves[name]) for name in sorted(self._leaves))

    @staticmethod
    def size(manifest: Manifest) -> int:
        """Bytes of the table that belongs to a manifest; raises CorruptCheckpoint over MAX_LEAF_TABLE."""
        size = merkle.DIGEST_SIZE * sum(t.leaf_count for t in manifest.tensors)
        if size > MAX_LEAF_TABLE:
            raise CorruptCheckpoint(f"a leaf table of {size} bytes; at most {MAX_LEAF_TABLE} are read")
        return size

    @classmethod
    def parse(cls, manifest: Manifest, data: bytes) -> LeafTable:
        """Read a table that may come from anybody; raises CorruptCheckpoint unless it proves every root."""
        expected = cls.size(manifest)
        if len(data) != expected:
            raise CorruptCheckpoint(f"a leaf table of {len(data)} bytes where {expected} belong")
        leaves: dict[str, tuple[bytes, ...]] = {}
        at = 0
        for tensor in manifest.tensors:
            end = at + merkle.DIGEST_SIZE * tensor.leaf_count
            digests = tuple(data[i : i + merkle.DIGEST_SIZE] for i in range(at, end, merkle.DIGEST_SIZE))
            if tensor_root_of(tensor.dtype, tensor.shape, digests).hex() != tensor.root:
                raise CorruptCheckpoint(f"the leaf table does not belong to tensor {tensor.name}")
            leaves[tensor.name] = digests
            at = end
        return cls(leaves)


def tensor_root_of(dtype: str, shape: Sequence[int], leaves: Sequence[bytes]) -> bytes:
    """The tensor root that follows from leaf digests."""
    return merkle.tensor_root(dtype, shape, dtypes.byte_length(dtype, shape), merkle.content_root(leaves))


def _tensor(item: Any) -> TensorRecord:
    _keys(item, {"name", "dtype", "shape", "root"})
    name, dtype, shape, root = item["name"], item["dtype"], item["shape"], item["root"]
    if not TENSOR_NAME.fullmatch(name) or name == "__metadata__":
        raise ValueError(f"tensor name {name[:80]!r}")
    if dtype not in dtypes.SIZES:
        raise ValueError(f"dtype {str(dtype)[:20]!r} of {name}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"shape of {name}")
    if any(type(n) is not int or n < 0 for n in shape) or dtypes.byte_length(dtype, shape) > _MAX_INTEGER:
        raise ValueError(f"shape of {name}")
    if not _ROOT.fullmatch(root):
        raise ValueError(f"root of {name}")
    return TensorRecord(name=name, dtype=dtype, shape=tuple(shape), root=root)


def _file(item: Any) -> FileRecord:
    _keys(item, {"path", "size", "sha256"})
    if item["path"] not in FUNCTIONAL_FILES:
        raise ValueError(f"{str(item['path'])[:80]!r} is not a functional file")
    if type(item["size"]) is not int or not 0 <= item["size"] <= MAX_FUNCTIONAL_FILE:
        raise ValueError(f"size of {item['path']}")
    return FileRecord(path=item["path"], size=item["size"], sha256=Digest(item["sha256"]))


def _keys(item: Any, expected: set[str]) -> None:
    if not isinstance(item, dict) or set(item) != expected:
        raise ValueError(f"expected exactly the keys {sorted(expected)}")


def _text(value: Any, limit: int) -> str:
    if not isinstance(value, str) or len(value) > limit:
        raise ValueError(f"expected at most {limit} characters of text")
    return value


def _sorted(names: list[str]) -> None:
    if any(a >= b for a, b in pairwise(names)):
        raise ValueError("names are not sorted, or one is repeated")
