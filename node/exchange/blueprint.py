"""Blueprint: what will lie where in a fetched directory, agreed by manifest, signature and headers.

Three claims meet here, from anybody: the manifest (proved by the ModelId), the signed list of files (proved
by the publisher's key) and the headers of the weight files (proved by nothing until the last byte has
arrived and the file's SHA-256 is known). Each tensor must be where exactly one header puts it, as the
manifest says. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from merge_core.checkpoint import merkle
from merge_core.checkpoint.header import Header, parse_header
from merge_core.checkpoint.manifest import FUNCTIONAL_FILES, LeafTable, Manifest
from merge_core.checkpoint.published import MANIFEST_FILE, MAX_WEIGHT_FILES, PUBLISHER_FILE, SIGNATURE_FILE
from merge_core.digest import Digest, canonical, sha256
from merge_core.errors import CorruptCheckpoint
from node.errors import PeerError, VerificationFailed
from node.identity.binding import Binding
from node.provenance.oms import parse_bundle

MAX_SMALL_FILES = 256 << 20
"""Bytes of all files but the weights together: they are held in memory until each has been checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One MiB of one tensor, and where it belongs."""

    number: int
    tensor: str
    begin: int
    """Offset in the tensor."""
    path: str
    offset: int
    """Offset in the file."""
    size: int
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One safetensors file: its header's bytes, its size, and the digest that the publisher signed."""

    path: str
    size: int
    sha256: Digest
    header: bytes


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """Everything but the tensors' bytes; `small` holds all other files, model.sig among them."""

    manifest: Manifest
    leaf_table: LeafTable
    publisher: Digest
    small: Mapping[str, bytes]
    weights: tuple[WeightFile, ...]

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """Every leaf that has bytes, in the order of the files; numbered from 0."""
        found: list[Leaf] = []
        for file in self.weights:
            for tensor, span in parse_header(file.header, file.size).tensors.items():
                for index, digest in enumerate(self.leaf_table[tensor]):
                    begin = index * merkle.LEAF_SIZE
                    size = merkle.leaf_size(span.end - span.begin, index)
                    if size:
                        found.append(
                            Leaf(
                                number=len(found),
                                tensor=tensor,
                                begin=begin,
                                path=file.path,
                                offset=span.begin + begin,
                                size=size,
                                digest=digest,
                            )
                        )
        return tuple(found)

    def by_tensor(self) -> dict[str, list[Leaf]]:
        """The leaves of each tensor that has bytes, in order."""
        tensors: dict[str, list[Leaf]] = {}
        for leaf in self.leaves:
            tensors.setdefault(leaf.tensor, []).append(leaf)
        return tensors

    @property
    def digest(self) -> Digest:
        """Names the layout: a partial directory can be gone on with only under the same one."""
        return sha256(
            canonical(
                {
                    "model": self.manifest.model_id,
                    "signature": sha256(self.small[SIGNATURE_FILE]),
                    "headers": [[file.path, file.size, sha256(file.header)] for file in self.weights],
                }
            )
        )


def signed_files(
    manifest: Manifest, bundle: bytes, publisher_record: bytes, publisher: Digest
) -> Mapping[str, Digest]:
    """The digests of all files as `publisher` signed them, once they agree with the manifest.

    Raises VerificationFailed: a bad signature, another publisher, or another model.
    """
    binding = Binding.parse(publisher_record)
    if binding.publisher.key_id != publisher:
        raise VerificationFailed("the publisher record is another publisher's")
    files = parse_bundle(bundle).open(binding.publisher).files
    if files.get(PUBLISHER_FILE) != sha256(publisher_record):
        raise VerificationFailed("the publisher record is not the one that was signed")
    if files.get(MANIFEST_FILE) != manifest.model_id:
        raise VerificationFailed("the publisher signed no manifest, or another one")
    functional = {path: digest for path, digest in files.items() if path in FUNCTIONAL_FILES}
    if functional != {record.path: record.sha256 for record in manifest.files}:
        raise VerificationFailed("the publisher signed other functional files than the manifest lists")
    if not 1 <= sum(is_weights(path) for path in files) <= MAX_WEIGHT_FILES:
        raise VerificationFailed(f"the number of weight files is not between 1 and {MAX_WEIGHT_FILES}")
    return files


def is_weights(path: str) -> bool:
    """Whether a published file holds tensors."""
    return path.endswith(".safetensors")


def check_headers(manifest: Manifest, headers: Mapping[str, Header]) -> None:
    """Require that the headers together place every tensor of the manifest once, and nothing else.

    Raises PeerError: the publisher's own headers do, so whoever sent these changed them.
    """
    placed: set[str] = set()
    expected = {tensor.name: tensor for tensor in manifest.tensors}
    for path, header in headers.items():
        for name, span in header.tensors.items():
            tensor = expected.get(name)
            if tensor is None or name in placed or (span.dtype, span.shape) != (tensor.dtype, tensor.shape):
                raise PeerError(f"the header of {path} places {name}, which the manifest has not so")
            placed.add(name)
    if len(placed) != len(expected):
        raise PeerError(f"the headers place {len(placed)} of {len(expected)} tensors")


def read_header(path: str, data: bytes, size: int) -> Header:
    """Parse the header that a peer sent for a file of `size` bytes; raises PeerError."""
    try:
        header = parse_header(data, size)
    except CorruptCheckpoint as error:
        raise PeerError(f"{path}: {error.why}") from error
    if header.length != len(data):
        raise PeerError(f"{path}: {len(data)} bytes where a header of {header.length} belongs")
    return header
