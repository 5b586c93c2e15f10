"""A new checkpoint, written out of sight and renamed into place when it is whole.

Everything goes into the hidden folder `.NAME.partial` beside the target. The weight files are preallocated
there with their headers, so a full disk shows at once; tensor bytes are written at their final place, in any
order, by any thread. What a crash leaves behind is opened again with the same tensors and keeps its bytes:
which of them are good is the caller's to know (a journal) and to check. `commit` makes all durable, then
renames it.

    with CheckpointWriter.create(target, tensors) as writer:
        writer.write("model.norm.weight", 0, data)
        writer.add_file("config.json", config)
        writer.commit()
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType, TracebackType

from merge_core.checkpoint.header import Span
from merge_core.checkpoint.published import INDEX, check_names
from merge_core.checkpoint.sharding import WeightFile, divide, index_of
from merge_core.checkpoint.source import TensorInfo
from merge_core.errors import CannotWrite
from merge_core.files import replace, sync
from merge_core.flushing import Flusher

MAX_SHARD_BYTES = 5 << 30
DEFAULT_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})

_FICLONE = 0x40049409
_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointWriter:
    """One checkpoint in the making; a context manager that closes it and keeps what is written so far.

    `path` is the hidden folder, where `Checkpoint.open` and `measure` work as soon as config.json is added;
    `resumed` says whether bytes of an earlier run were kept. Only one writer has a target open at a time.
    """

    def __init__(self, target: Path, path: Path, files: tuple[WeightFile, ...], lock: int) -> None:
        """Take over the locked folder `path`; use `create`."""
        self.target = target
        self.path = path
        self.resumed = False
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            dict(sorted((name, span.info) for file in files for name, span in file.header.tensors.items()))
        )
        self._files = files
        self._lock: int | None = lock
        self._flusher = Flusher()
        self._descriptors: dict[str, int] = {}
        self._where: dict[str, tuple[int, Span]] = {}

    @classmethod
    def create(
        cls,
        target: Path,
        tensors: Mapping[str, TensorInfo],
        *,
        metadata: Mapping[str, str] = DEFAULT_METADATA,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> CheckpointWriter:
        """Preallocate a checkpoint of `tensors` beside `target`, or take up the partial one that lies there.

        Raises CannotWrite where the target exists and is not empty, the disk is full (then nothing is left)
        or another process writes there; ValueError on tensors that no header can hold.
        """
        files = divide(tensors, metadata=metadata, max_shard_bytes=max_shard_bytes)
        writer = cls._prepare(target, files)
        try:
            if len(files) > 1:
                writer.add_file(INDEX, index_of(files))
        except BaseException:
            writer.close()
            raise
        return writer

    @classmethod
    def _prepare(cls, target: Path, files: tuple[WeightFile, ...]) -> CheckpointWriter:
        target = target.resolve()
        path = partial_path(target)
        with _explained(target):
            _refuse_occupied(target)
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
        writer = cls(target, path, files, lock)
        try:
            with _explained(target):
                writer._open()
        except BaseException:
            writer.close()
            raise
        return writer

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(CannotWrite) if error else nullcontext():
            self.close()

    def write(self, tensor: str, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes of a tensor from `offset` on.

        Raises KeyError on an unknown tensor, ValueError outside of it, CannotWrite when the disk fails.
        """
        descriptor, at, view = self._locate(tensor, offset, memoryview(data).cast("B"))
        with self._out_of_space():
            while view:
                count = os.pwrite(descriptor, view, at)
                view = view[count:]
                at += count
                self._flusher.wrote(descriptor, count)

    def read(self, tensor: str, offset: int, length: int) -> bytes:
        """Read bytes of a tensor back: zeros where nothing was written yet."""
        descriptor, at, view = self._locate(tensor, offset, memoryview(bytearray(length)))
        rest = view
        while rest:
            count = os.preadv(descriptor, [rest], at)
            if count == 0:
                raise CannotWrite(f"{self.path}: somebody else shortened a weight file", hint="run it again")
            rest = rest[count:]
            at += count
        return bytes(view)

    def add_file(self, name: str, data: bytes) -> None:
        """Put a small file beside the weights, whole or not at all; it replaces one of the same name.

        Files that were added before a crash are gone after it: add them again. Raises CorruptCheckpoint on a
        name that cannot be published, ValueError on that of a weight file, CannotWrite when the disk is full.
        """
        self._require_open()
        if any(name == file.name for file in self._files):
            raise ValueError(f"{name} is a weight file of {self.target}")
        check_names({name, *(path.name for path in self.path.iterdir() if not path.name.startswith("."))})
        with self._out_of_space():
            replace(self.path / name, data)

    def commit(self) -> Path:
        """Make everything durable and rename it into place; returns the target. The writer is closed then.

        Raises CannotWrite where something has come to lie at the target meanwhile; the partial folder stays.
        """
        self._require_open()
        with self._out_of_space():
            self._flusher.close()
            for path in sorted(self.path.iterdir()):
                sync(path) if not path.name.startswith(".") else path.unlink()
            sync(self.path)
        with _explained(self.target):
            self.path.rename(self.target)
            sync(self.target.parent)
        self.close()
        return self.target

    def close(self) -> None:
        """Close the files; what is written stays for the next run to take up. Raises CannotWrite."""
        try:
            with _explained(self.target):
                self._flusher.close()
        finally:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])
            self._where.clear()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def discard(self) -> None:
        """Remove everything that was written; a second call does nothing."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def _open(self) -> None:
        names = {file.name for file in self._files}
        found = {path.name for path in self.path.iterdir()}
        self.resumed = bool(found) and all(_same_layout(self.path, file) for file in self._files)
        for name in found - (names if self.resumed else set()):
            _remove(self.path / name)
        try:
            for file in self._files:
                self._descriptors[file.name] = _allocate(self.path / file.name, file, fresh=not self.resumed)
        except BaseException:
            if not self.resumed:
                self.discard()
            raise
        self._where = {
            name: (self._descriptors[file.name], span)
            for file in self._files
            for name, span in file.header.tensors.items()
        }

    def _locate(self, tensor: str, offset: int, view: memoryview) -> tuple[int, int, memoryview]:
        self._require_open()
        descriptor, span = self._where[tensor]
        if offset < 0 or offset + len(view) > span.end - span.begin:
            raise ValueError(f"bytes {offset} to {offset + len(view)} of {tensor}: outside of the tensor")
        return descriptor, span.begin + offset, view

    def _require_open(self) -> None:
        if self._lock is None:
            raise ValueError(f"the writer of {self.target} is closed")

    @contextmanager
    def _out_of_space(self) -> Iterator[None]:
        """Leave nothing behind on a full disk: the space is wanted for something else."""
        try:
            with _explained(self.target):
                yield
        except CannotWrite as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL:
                self.discard()
            raise


def partial_path(target: Path) -> Path:
    """The hidden folder in which the checkpoint for `target` grows."""
    target = target.resolve()
    return target.with_name(f".{target.name}.partial")


def _refuse_occupied(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CannotWrite(f"{target} exists and is not empty", hint=f"weft merge RECIPE -o {target}-2")


def _lock(path: Path) -> int:
    """An open descriptor of the folder that no other process has locked; the lock ends with the process."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The folder may have been renamed or removed, and made anew, before the lock was ours.
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise BlockingIOError
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise CannotWrite(f"another process is writing {path}", hint="weft jobs") from error
        raise
    return descriptor


def _same_layout(folder: Path, file: WeightFile) -> bool:
    path = folder / file.name
    if path.is_symlink() or not path.is_file() or path.stat().st_size != file.size:
        return False
    with path.open("rb") as opened:
        return opened.read(len(file.head)) == file.head


def _allocate(path: Path, file: WeightFile, *, fresh: bool) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if fresh else 0)
    descriptor = os.open(path, flags, 0o644)
    try:
        if fresh:
            _reserve(descriptor, file.size)
            # The header goes in last: a file without it is not taken for one that can be resumed.
            os.pwrite(descriptor, file.head, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _reserve(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn an OSError into a CannotWrite that says what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise CannotWrite(
                f"no space left for {target}",
                hint=f"free some space (df -h {target.parent}) and run it again",
            ) from error
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise CannotWrite(
                f"{target} exists and is not empty", hint=f"weft merge RECIPE -o {target}-2"
            ) from error
        why = f"{target} cannot be written: {error.strerror}"
        raise CannotWrite(why, hint=f"ls -ld {target.parent}") from error


def clone_tree(files: Mapping[str, Path], destination: Path) -> dict[str, str]:
    """Put the contents of `files` (name -> source) into a new folder, sharing the disk blocks where possible.

    Each file is a reflink, else a hardlink, else a copy; which one is returned by name. A source that is a
    symlink is followed. Nothing is ever written to a source, and a hardlink must not be written through.
    On any error the folder is removed. Raises CorruptCheckpoint on a bad name, CannotWrite
    where the folder exists or the disk is full.
    """
    check_names(files)
    with _explained(destination):
        destination.mkdir(parents=True)
        try:
            made = {name: _clone(files[name].resolve(), destination / name) for name in sorted(files)}
            sync(destination)
        except BaseException:
            shutil.rmtree(destination, ignore_errors=True)
            raise
    return made


def _clone(source: Path, destination: Path) -> str:
    if _reflink(source, destination):
        return "reflink"
    try:
        destination.hardlink_to(source)
        return "hardlink"
    except OSError:  # another disk, no hardlinks there, too many of them, or somebody else's file
        destination.unlink(missing_ok=True)
    shutil.copyfile(source, destination)
    sync(destination)
    return "copy"


def _reflink(source: Path, destination: Path) -> bool:
    with source.open("rb") as old, destination.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            os.fsync(new.fileno())
            return True
        except OSError:  # most filesystems cannot
            destination.unlink()
            return False
