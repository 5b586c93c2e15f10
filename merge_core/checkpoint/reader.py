"""A Hugging Face directory read with `pread`: headers first, bytes only where they are asked for.

    Checkpoint      the open directory: tensors, config, raw bytes; nothing is verified but structure
    measure         one hashing pass over all bytes: the Manifest and the LeafTable
    VerifiedSource  the TensorSource that hashes every leaf again as it is read

Positioned reads into reused buffers, not mmap: mapped pages count as memory of the process
and were no faster. Who reads the same weights again and again maps them (`Checkpoint.view`).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Protocol

from merge_core.checkpoint import merkle, published
from merge_core.checkpoint.header import PREFIX, Header, Span, header_length, parse_header
from merge_core.checkpoint.manifest import (
    MAX_FUNCTIONAL_FILE,
    MAX_TENSORS,
    FileRecord,
    LeafTable,
    Manifest,
    TensorRecord,
    tensor_root_of,
)
from merge_core.checkpoint.source import TensorInfo
from merge_core.digest import sha256
from merge_core.errors import CorruptCheckpoint

MAX_CONFIG = 4 << 20
_BATCH_LEAVES = 16
_HINT = "fetch or export the checkpoint again, then: weft add DIR"


class FileStamp(NamedTuple):
    """What identifies the contents of an open weight file without reading it; times in nanoseconds.

    `mtime_ns` can be set by anybody; `changed_ns` (ctime) cannot, and moves whenever a byte does.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    changed_ns: int

    @classmethod
    def of(cls, descriptor: int) -> FileStamp:
        """The stamp of an open file as it is now."""
        status = os.fstat(descriptor)
        return cls(
            device=status.st_dev,
            inode=status.st_ino,
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            changed_ns=status.st_ctime_ns,
        )


class Checkpoint:
    """A model directory with its weight files open; a context manager that closes them.

    Reads from several threads at once are fine: every read is positioned.
    """

    def __init__(self, path: Path, survey: published.Survey, files: Mapping[str, int]) -> None:
        """Take over the descriptors in `files`; use `Checkpoint.open`."""
        self.path = path
        self.survey = survey
        self._files = dict(files)
        self._where: dict[str, tuple[int, Span]] = {}
        self._maps: dict[int, memoryview] = {}
        self.config: dict[str, Any] = {}
        self.architecture = ""
        self.tensors: Mapping[str, TensorInfo] = {}
        self.stamps: Mapping[str, FileStamp] = {}

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Open a directory and read its headers and config, no weights.

        Raises CorruptCheckpoint on anything that is not a whole safetensors checkpoint.
        """
        survey = published.survey(directory)
        files: dict[str, int] = {}
        checkpoint = cls(directory, survey, files)
        try:
            for name in survey.weights:
                checkpoint._files[name] = os.open(directory / name, os.O_RDONLY | os.O_CLOEXEC)
            checkpoint._read_config()
            checkpoint._read_headers()
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the weight files; nothing can be read afterwards."""
        self._maps.clear()
        while self._files:
            os.close(self._files.popitem()[1])
        self._where.clear()

    def read_bytes(self, tensor: str, offset: int, length: int, into: memoryview | None = None) -> memoryview:
        """Read `length` bytes of a tensor from `offset` on, into the start of `into` where it is given.

        Raises KeyError on an unknown tensor, ValueError outside of it, CorruptCheckpoint if the file shrank.
        """
        descriptor, span = self._where[tensor]
        if offset < 0 or length < 0 or offset + length > span.end - span.begin:
            raise ValueError(f"bytes {offset} to {offset + length} of {tensor}: outside of the tensor")
        view = (memoryview(bytearray(length)) if into is None else into.cast("B"))[:length]
        if len(view) != length:
            raise ValueError(f"a buffer of {len(view)} bytes for {length}")
        done = 0
        while done < length:
            count = os.preadv(descriptor, [view[done:]], span.begin + offset + done)
            if count == 0:
                raise CorruptCheckpoint(f"{self.path}: the file of {tensor} became shorter", hint=_HINT)
            done += count
        return view

    def view(self, tensor: str) -> memoryview:
        """The bytes of a tensor as pages of its file, which processes share and whoever writes there changes.

        It outlives the checkpoint. Raises KeyError on an unknown tensor, CorruptCheckpoint if a file shrank.
        """
        descriptor, span = self._where[tensor]
        if span.begin == span.end:
            return memoryview(b"")
        if descriptor not in self._maps:
            self._maps[descriptor] = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
        view = self._maps[descriptor][span.begin : span.end]
        if len(view) != span.end - span.begin:
            raise CorruptCheckpoint(f"{self.path}: the file of {tensor} became shorter", hint=_HINT)
        return view

    def stamp(self, tensor: str) -> FileStamp:
        """The stamp of the file of a tensor as it is now."""
        return FileStamp.of(self._where[tensor][0])

    def functional_files(self) -> dict[str, bytes]:
        """The contents of config, tokenizer and chat template, by name, sorted; each at most 64 MiB."""
        return {
            name: published.read_bounded(self.path / name, MAX_FUNCTIONAL_FILE)
            for name in self.survey.functional
        }

    def _read_config(self) -> None:
        if "config.json" not in self.survey.functional:
            raise CorruptCheckpoint(
                f"{self.path} has no config.json",
                hint=f"ls {self.path}; then name one that save_pretrained wrote",
            )
        self.config = parse_config(published.read_bounded(self.path / "config.json", MAX_CONFIG))
        self.architecture = architecture_of(self.config)

    def _read_headers(self) -> None:
        stamps: dict[str, FileStamp] = {}
        total = 0
        for name, descriptor in self._files.items():
            stamps[name] = FileStamp.of(descriptor)
            header = _header_of(name, descriptor, stamps[name].size)
            total += len(header.tensors)
            if total > MAX_TENSORS:
                raise CorruptCheckpoint(f"{self.path} has more than {MAX_TENSORS} tensors")
            for tensor, span in header.tensors.items():
                if tensor in self._where:
                    raise CorruptCheckpoint(f"tensor {tensor} lies in two weight files", hint=_HINT)
                self._where[tensor] = (descriptor, span)
        if not self._where:
            raise CorruptCheckpoint(f"{self.path} has no tensors", hint=_HINT)
        self._check_index()
        self.stamps = MappingProxyType(stamps)
        self.tensors = MappingProxyType({name: self._where[name][1].info for name in sorted(self._where)})

    def _check_index(self) -> None:
        if published.INDEX not in self.survey.other:
            return
        claimed = published.parse_index(
            published.read_bounded(self.path / published.INDEX, published.MAX_INDEX)
        )
        names = {descriptor: name for name, descriptor in self._files.items()}
        actual = {tensor: names[descriptor] for tensor, (descriptor, _) in self._where.items()}
        for tensor in sorted(claimed.keys() | actual.keys()):
            if claimed.get(tensor) != actual.get(tensor):
                raise CorruptCheckpoint(
                    f"{published.INDEX} says {claimed.get(tensor, 'nothing')} of tensor {tensor}, "
                    f"the weight files say {actual.get(tensor, 'nothing')}",
                    hint=_HINT,
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one hashing pass gives."""

    manifest: Manifest
    leaves: LeafTable


def measure(
    checkpoint: Checkpoint, *, threads: int = 2, on_progress: Callable[[int], None] | None = None
) -> Measured:
    """Hash every byte of a checkpoint once, with a buffer of 1 MiB per thread.

    `on_progress` is called in the caller's thread with the number of tensor bytes hashed since the last call.
    Raises CorruptCheckpoint if a file shrinks meanwhile.
    """
    leaves: dict[str, list[bytes]] = {name: [] for name in checkpoint.tensors}
    local = threading.local()

    def digest(batch: list[tuple[str, int, int]]) -> list[bytes]:
        buffer = local.__dict__.setdefault("buffer", memoryview(bytearray(merkle.LEAF_SIZE)))
        return [merkle.leaf_digest(checkpoint.read_bytes(*piece, into=buffer)) for piece in batch]

    batches = list(_batches(checkpoint.tensors))
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="measure") as pool:
        try:
            for batch, digests in zip(batches, pool.map(digest, batches), strict=True):
                for (tensor, _, _), value in zip(batch, digests, strict=True):
                    leaves[tensor].append(value)
                if on_progress:
                    on_progress(sum(length for _, _, length in batch))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    manifest = Manifest(
        architecture=checkpoint.architecture,
        files=tuple(file_record(name, data) for name, data in checkpoint.functional_files().items()),
        tensors=tuple(tensor_record(name, info, leaves[name]) for name, info in checkpoint.tensors.items()),
    )
    return Measured(manifest=manifest, leaves=LeafTable(leaves))


class Leaves(Protocol):
    """The leaf digests of tensors, in leaf order: a LeafTable, or what reads one when it is asked."""

    def __getitem__(self, tensor: str) -> Sequence[bytes]: ...


class VerifiedSource:
    """A checkpoint on disk as a TensorSource: no byte comes out that its leaf digest does not vouch for.

    A leaf is hashed when it is first read, and again only if its file was written to since: an operator that
    measures before it computes reads everything several times. A file that is as it was when the leaf table
    was made of it, by its stamp, is not hashed again at all, nor is the table asked.
    """

    def __init__(self, checkpoint: Checkpoint, leaves: Leaves, *, hashed: Collection[FileStamp] = ()) -> None:
        """Read from an open checkpoint, which the caller closes; `hashed` are files that the leaves are of.

        Raises CorruptCheckpoint where the leaf table was made for other tensors.
        """
        self._checkpoint = checkpoint
        self._leaves = leaves
        self._local = threading.local()
        self._hashed = frozenset(hashed)
        self._verified: dict[str, dict[int, FileStamp]] = {}
        if not self._hashed.issuperset(checkpoint.stamps.values()):
            for name in checkpoint.tensors:
                self._expected(name)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, sorted by name."""
        return self._checkpoint.tensors

    def read(self, tensor: str, offset: int, length: int, into: memoryview | None = None) -> memoryview:
        """Read bytes into `into`, else into memory that the same thread's next read here uses again.

        Leaves that have to be hashed are read as a whole. Raises KeyError on an unknown tensor, ValueError
        outside of it, CorruptCheckpoint on a wrong leaf.
        """
        whole = self._checkpoint.tensors[tensor].length
        if not 0 <= offset <= offset + length <= whole:
            raise ValueError(f"bytes {offset} to {offset + length} of {tensor}, which has {whole}")
        # Before the bytes: whoever writes after this shows at the next read.
        stamp = self._checkpoint.stamp(tensor)
        target = self._buffer("read", length) if into is None else into
        if stamp in self._hashed:
            return self._checkpoint.read_bytes(tensor, offset, length, into=target)
        first = min(offset // merkle.LEAF_SIZE, merkle.leaf_count(whole) - 1)
        last = max(first, (offset + length - 1) // merkle.LEAF_SIZE)
        verified = self._verified.setdefault(tensor, {})
        if all(verified.get(leaf) == stamp for leaf in range(first, last + 1)):
            return self._checkpoint.read_bytes(tensor, offset, length, into=target)
        return self._verify(tensor, first, last, stamp, offset, target[:length])

    def _verify(
        self, tensor: str, first: int, last: int, stamp: FileStamp, offset: int, target: memoryview
    ) -> memoryview:
        """Read whole leaves, hash those that no earlier read did, and fill `target` with what lies there."""
        whole = self._checkpoint.tensors[tensor].length
        expected, verified = self._expected(tensor), self._verified[tensor]
        begin = first * merkle.LEAF_SIZE
        size = min((last + 1) * merkle.LEAF_SIZE, whole) - begin
        exact = begin == offset and size == len(target)
        view = target if exact else self._buffer("leaves", size)
        view = self._checkpoint.read_bytes(tensor, begin, size, into=view)
        for leaf in range(first, last + 1):
            start = leaf * merkle.LEAF_SIZE - begin
            if verified.get(leaf) == stamp:
                continue
            if merkle.leaf_digest(view[start : start + merkle.LEAF_SIZE]) != expected[leaf]:
                raise CorruptCheckpoint(
                    f"{self._checkpoint.path}: leaf {leaf} of {tensor} is not what was published",
                    hint=f"weft verify {self._checkpoint.path}",
                )
            verified[leaf] = stamp
        if not exact:
            target[:] = view[offset - begin : offset - begin + len(target)]
        return target

    def _expected(self, tensor: str) -> Sequence[bytes]:
        """The digests that a tensor has; raises CorruptCheckpoint where the leaf table says none for it."""
        try:
            expected = self._leaves[tensor]
        except KeyError:
            expected = ()
        if len(expected) != merkle.leaf_count(self._checkpoint.tensors[tensor].length):
            raise CorruptCheckpoint(f"the leaf table does not belong to tensor {tensor}", hint=_HINT)
        return expected

    def _buffer(self, use: str, length: int) -> memoryview:
        buffer: memoryview | None = getattr(self._local, use, None)
        if buffer is None or len(buffer) < length:
            buffer = memoryview(bytearray(max(length, merkle.LEAF_SIZE)))
            setattr(self._local, use, buffer)
        return buffer[:length]


def read_functional(directory: Path, manifest: Manifest) -> dict[str, bytes]:
    """The functional files of a checkpoint, as its manifest names them; raises CorruptCheckpoint."""
    return read_recorded(directory, manifest.files)


def read_recorded(directory: Path, records: Sequence[FileRecord]) -> dict[str, bytes]:
    """Files of a checkpoint, as these records name them; raises CorruptCheckpoint."""
    files: dict[str, bytes] = {}
    for record in records:
        files[record.path] = published.read_bounded(directory / record.path, record.size)
        if sha256(files[record.path]) != record.sha256:
            raise CorruptCheckpoint(
                f"{directory / record.path} is not what was published", hint=f"weft verify {directory}"
            )
    return files


def parse_config(data: bytes) -> dict[str, Any]:
    """Read a config.json that may come from anybody: a JSON object of at most 4 MiB.

    Raises CorruptCheckpoint.
    """
    if len(data) > MAX_CONFIG:
        raise CorruptCheckpoint(f"config.json has {len(data)} bytes; at most {MAX_CONFIG} are read")
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"config.json cannot be read: {error}", hint=_HINT) from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint("config.json is not a JSON object", hint=_HINT)
    return value


def architecture_of(config: Mapping[str, Any]) -> str:
    """The name of the architecture as config.json gives it: `architectures[0]`, else `model_type`.

    Raises CorruptCheckpoint where it names none.
    """
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else config.get("model_type")
    if not isinstance(name, str) or not 0 < len(name) <= 128 or not name.isprintable():
        raise CorruptCheckpoint(
            "config.json names no architecture", hint="add `architectures` to config.json, then: weft add DIR"
        )
    return name


def file_record(name: str, data: bytes) -> FileRecord:
    """The manifest's record of a functional file."""
    return FileRecord(path=name, size=len(data), sha256=sha256(data))


def tensor_record(name: str, info: TensorInfo, leaves: list[bytes]) -> TensorRecord:
    """The manifest's record of a tensor, from the digests of its leaves in order."""
    root = tensor_root_of(info.dtype, info.shape, leaves).hex()
    return TensorRecord(name=name, dtype=info.dtype, shape=info.shape, root=root)


def file_digest(path: Path, on_progress: Callable[[int], None] | None = None) -> str:
    """The SHA-256 (hex) of a file, read 1 MiB at a time; `on_progress` gets the bytes since its last call."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(merkle.LEAF_SIZE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if on_progress:
                on_progress(count)
    return digest.hexdigest()


def _header_of(name: str, descriptor: int, size: int) -> Header:
    try:
        length = header_length(os.pread(descriptor, PREFIX, 0), size)
        return parse_header(os.pread(descriptor, length, 0), size)
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{name}: {error.why}", hint=error.hint) from error


def _batches(tensors: Mapping[str, TensorInfo]) -> Iterator[list[tuple[str, int, int]]]:
    """Pieces (tensor, offset, length) of a leaf each, up to 16 together: small tensors share a batch."""
    batch: list[tuple[str, int, int]] = []
    for name, info in tensors.items():
        for index in range(merkle.leaf_count(info.length)):
            batch.append((name, index * merkle.LEAF_SIZE, merkle.leaf_size(info.length, index)))
            if len(batch) == _BATCH_LEAVES:
                yield batch
                batch = []
    if batch:
        yield batch
