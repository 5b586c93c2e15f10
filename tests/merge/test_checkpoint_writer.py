"""A checkpoint in the making: whole and in place, or not there; killed anywhere, taken up again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from merge_core.checkpoint.published import INDEX
from merge_core.checkpoint.reader import Checkpoint, measure
from merge_core.checkpoint.sharding import divide, index_of
from merge_core.checkpoint.source import TensorInfo
from merge_core.checkpoint.writer import CheckpointWriter, clone_tree, partial_path
from merge_core.errors import CannotWrite, CorruptCheckpoint

CONFIG = b'{"architectures":["LlamaForCausalLM"]}'
TENSORS = {
    "model.embed_tokens.weight": TensorInfo(dtype="F32", shape=(64, 16)),
    "model.layers.0.mlp.up_proj.weight": TensorInfo(dtype="F16", shape=(33, 5)),
    "model.norm.weight": TensorInfo(dtype="F32", shape=(16,)),
    "model.none": TensorInfo(dtype="F32", shape=(0,)),
}


def content(tensors: Mapping[str, TensorInfo] = TENSORS) -> dict[str, bytes]:
    rng = np.random.default_rng(11)
    return {name: rng.bytes(tensors[name].length) for name in sorted(tensors)}


def write_all(writer: CheckpointWriter) -> None:
    for name, data in content(writer.tensors).items():
        half = len(data) // 2
        writer.write(name, half, data[half:])
        writer.write(name, 0, memoryview(data)[:half])
    writer.add_file("config.json", CONFIG)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("max_shard_bytes", [5 << 30, 1000, 1])
def test_what_is_written_is_an_ordinary_checkpoint(tmp_path: Path, max_shard_bytes: int) -> None:
    target = tmp_path / "out"
    with CheckpointWriter.create(target, TENSORS, max_shard_bytes=max_shard_bytes) as writer:
        assert not writer.resumed
        write_all(writer)
        assert writer.read("model.norm.weight", 4, 8) == content()["model.norm.weight"][4:12]
        assert not target.exists()
        with Checkpoint.open(writer.path) as checkpoint:
            before = measure(checkpoint).manifest
        assert writer.commit() == target
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with Checkpoint.open(target) as checkpoint:
        assert checkpoint.tensors == dict(sorted(TENSORS.items()))
        assert measure(checkpoint).manifest == before
        assert {n: bytes(checkpoint.read_bytes(n, 0, i.length)) for n, i in TENSORS.items()} == content()
        loaded = [load_file(target / name) for name in checkpoint.survey.weights]
    assert {n: array.tobytes() for part in loaded for n, array in part.items()} == content()


def test_two_runs_give_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with CheckpointWriter.create(tmp_path / name, TENSORS, max_shard_bytes=1000) as writer:
            write_all(writer)
            writer.commit()
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_partial_checkpoint_of_the_same_layout_is_taken_up(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with CheckpointWriter.create(target, TENSORS, max_shard_bytes=1000) as writer:
        writer.write("model.norm.weight", 0, b"kept")
        writer.add_file("weft.plan.json", b"{}")
    assert not target.exists()
    with CheckpointWriter.create(target, TENSORS, max_shard_bytes=1000) as writer:
        assert writer.resumed
        assert writer.read("model.norm.weight", 0, 4) == b"kept"
        assert not (writer.path / "weft.plan.json").exists()


def test_a_partial_checkpoint_of_another_layout_is_started_anew(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with CheckpointWriter.create(target, TENSORS, max_shard_bytes=1000) as writer:
        writer.write("model.norm.weight", 0, b"lost")
    (writer.path / "stray").mkdir()
    with CheckpointWriter.create(target, TENSORS) as writer:
        assert not writer.resumed
        assert writer.read("model.norm.weight", 0, 4) == bytes(4)
        write_all(writer)
        writer.commit()
    assert sorted(files_of(target)) == ["config.json", "model.safetensors"]


def test_only_one_writer_at_a_time(tmp_path: Path) -> None:
    with CheckpointWriter.create(tmp_path / "out", TENSORS) as writer:
        with pytest.raises(CannotWrite, match="another process") as caught:
            CheckpointWriter.create(tmp_path / "out", TENSORS)
        assert caught.value.hint
        writer.write("model.norm.weight", 0, b"mine")
        assert writer.read("model.norm.weight", 0, 4) == b"mine"
    CheckpointWriter.create(tmp_path / "out", TENSORS).close()


def test_what_lies_at_the_target_is_never_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with CheckpointWriter.create(target, TENSORS) as writer:  # an empty folder may be
        write_all(writer)
        (target / "precious").write_text("mine")
        with pytest.raises(CannotWrite, match="not empty"):
            writer.commit()
        assert writer.path.is_dir()
    with pytest.raises(CannotWrite, match="not empty"):
        CheckpointWriter.create(target, TENSORS)
    assert files_of(target) == {"precious": b"mine"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CannotWrite, match="not empty"):
        CheckpointWriter.create(tmp_path / "file", TENSORS)


def test_discard_leaves_nothing(tmp_path: Path) -> None:
    writer = CheckpointWriter.create(tmp_path / "deep" / "out", TENSORS)
    write_all(writer)
    writer.discard()
    writer.discard()
    assert list((tmp_path / "deep").iterdir()) == []
    with pytest.raises(ValueError, match="closed"):
        writer.write("model.norm.weight", 0, b"late")
    with pytest.raises(ValueError, match="closed"):
        writer.commit()


def test_nothing_is_written_outside_of_a_tensor(tmp_path: Path) -> None:
    with CheckpointWriter.create(tmp_path / "out", TENSORS) as writer:
        before = files_of(writer.path)
        for offset, data in ((61, b"1234"), (-1, b"1"), (65, b"")):
            with pytest.raises(ValueError, match="outside"):
                writer.write("model.norm.weight", offset, data)
        with pytest.raises(KeyError):
            writer.write("model.nothing", 0, b"1")
        assert files_of(writer.path) == before


@pytest.mark.parametrize("name", ["../escape.json", "/etc/passwd", ".hidden", "con", "a/b.json", ""])
def test_a_small_file_with_a_bad_name_is_refused(tmp_path: Path, name: str) -> None:
    with CheckpointWriter.create(tmp_path / "out", TENSORS) as writer:
        before = files_of(writer.path)
        with pytest.raises(CorruptCheckpoint):
            writer.add_file(name, b"x")
        assert files_of(writer.path) == before
        with pytest.raises(ValueError, match="weight file"):
            writer.add_file("model.safetensors", b"x")
        writer.add_file("README.md", b"x")
        with pytest.raises(CorruptCheckpoint, match="upper and lower"):
            writer.add_file("readme.md", b"x")


@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,4}", fullmatch=True),
        st.builds(
            lambda dtype, shape: TensorInfo(dtype=dtype, shape=tuple(shape)),
            st.sampled_from(["F32", "BF16", "I64", "U8"]),
            st.lists(st.integers(0, 9), max_size=2),
        ),
        max_size=12,
    ),
    st.integers(1, 200),
)
@settings(max_examples=150, deadline=None)
def test_every_tensor_lies_in_exactly_one_file(tensors: dict[str, TensorInfo], limit: int) -> None:
    files = divide(tensors, metadata={}, max_shard_bytes=limit)
    placed = [name for file in files for name in file.header.tensors]
    assert sorted(placed) == sorted(tensors)
    for file in files:
        held = [tensors[name].length for name in file.header.tensors]
        assert sum(held) <= limit or len([n for n in held if n]) <= 1
    index = json.loads(index_of(files))
    assert index["metadata"]["total_size"] == sum(info.length for info in tensors.values())
    assert sorted(index["weight_map"]) == sorted(tensors)


def test_headers_stay_readable_however_many_tensors_there_are() -> None:
    tensors = {f"layer.{i}.{'x' * 200}": TensorInfo(dtype="U8", shape=(1,)) for i in range(20_000)}
    files = divide(tensors, metadata={}, max_shard_bytes=1 << 40)
    assert len(files) > 1
    assert sum(len(file.header.tensors) for file in files) == len(tensors)


_KILLED_ANYWHERE = """
import json, os, signal, sys
from pathlib import Path
from merge_core.checkpoint.source import TensorInfo
from merge_core.checkpoint.writer import CheckpointWriter

POINT = int(sys.argv[1])
CALLS = ("open", "mkdir", "posix_fallocate", "pwrite", "fsync", "replace", "rename", "unlink")
TENSORS = {f"t{i}": TensorInfo(dtype="F32", shape=(256,)) for i in range(4)}

def job(target, journal):
    done = set(journal.read_text().split()) if journal.exists() else set()
    with CheckpointWriter.create(target, TENSORS, max_shard_bytes=2048) as writer:
        for i, name in enumerate(TENSORS):
            data = bytes([i + 1]) * 1024
            if name in done and writer.read(name, 0, 1024) == data:
                continue
            writer.write(name, 0, data)
            with journal.open("a") as file:
                file.write(name + chr(10))
        writer.add_file("config.json", b"{}")
        writer.commit()

def killed_at(point):
    left = point
    def wrap(real):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))

def attempt(target, journal, point=None):
    child = os.fork()
    if child == 0:
        if point is not None:
            killed_at(point)
        job(target, journal)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

killed = 0
for point in range(POINT, 10_000, 2):
    folder = Path(sys.argv[2], str(point))
    folder.mkdir()
    target, journal = folder / "out", folder / "journal"
    code = attempt(target, journal, point)
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    killed += 1
    if not target.exists():
        assert attempt(target, journal, point // 2) in (0, -signal.SIGKILL)
    if not target.exists():
        assert attempt(target, journal) == 0
    found = sorted(p.name for p in folder.iterdir())
    assert found == ["journal", "out"], (point, found)
print(killed)
"""


@pytest.mark.parametrize("parity", [0, 1])
def test_killed_at_any_system_call_it_ends_with_the_same_bytes(tmp_path: Path, parity: int) -> None:
    """Kill the job at each of its system calls, then again while it resumes, then let it end."""
    result = subprocess.run(
        [sys.executable, "-c", _KILLED_ANYWHERE, str(parity), str(tmp_path)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 10
    outcomes = [files_of(path / "out") for path in tmp_path.iterdir()]
    assert all(outcome == outcomes[0] for outcome in outcomes)
    whole = outcomes[0]
    assert sorted(whole) == ["config.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)), INDEX]
    assert whole["model-00002-of-00002.safetensors"].endswith(b"\x03" * 1024 + b"\x04" * 1024)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_checkpoint_that_does_not_fit_leaves_nothing(small_disk: Path) -> None:
    tensors = {f"t{i}": TensorInfo(dtype="U8", shape=(1 << 20,)) for i in range(6)}
    with pytest.raises(CannotWrite, match="no space left") as caught:
        CheckpointWriter.create(small_disk / "out", tensors, max_shard_bytes=2 << 20)
    assert "df -h" in caught.value.hint
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way_leaves_nothing(small_disk: Path) -> None:
    tensors = {f"t{i}": TensorInfo(dtype="U8", shape=(1 << 20,)) for i in range(3)}
    with CheckpointWriter.create(small_disk / "out", tensors) as writer:
        for name in tensors:
            writer.write(name, 0, bytes(1 << 20))
        with pytest.raises(CannotWrite, match="no space left"):
            writer.add_file("tokenizer.json", bytes(2 << 20))
    assert list(small_disk.iterdir()) == []


def test_a_copy_that_does_not_fit_leaves_nothing(tmp_path: Path, small_disk: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(bytes(5 << 20))
    with pytest.raises(CannotWrite, match="no space left"):
        clone_tree({"a.json": big, "b.json": big}, small_disk / "copy")
    assert list(small_disk.iterdir()) == []


def test_space_is_taken_at_once(tmp_path: Path) -> None:
    tensors = {"t": TensorInfo(dtype="U8", shape=(8 << 20,))}
    with CheckpointWriter.create(tmp_path / "out", tensors) as writer:
        assert (writer.path / "model.safetensors").stat().st_blocks * 512 >= 8 << 20


def test_a_clone_shares_or_copies_and_leaves_its_source_alone(tmp_path: Path) -> None:
    source = tmp_path / "blob"
    source.write_bytes(b"weights")
    (tmp_path / "link").symlink_to(source)
    before = source.stat()
    made = clone_tree({"a.safetensors": source, "b.json": tmp_path / "link"}, tmp_path / "clone")
    assert made.keys() == {"a.safetensors", "b.json"}
    assert set(made.values()) <= {"reflink", "hardlink", "copy"}
    assert files_of(tmp_path / "clone") == {"a.safetensors": b"weights", "b.json": b"weights"}
    assert not any(path.is_symlink() for path in (tmp_path / "clone").iterdir())
    after = source.stat()
    assert (after.st_mtime_ns, after.st_size, after.st_ino) == (
        before.st_mtime_ns,
        before.st_size,
        before.st_ino,
    )


def test_a_clone_across_disks_is_a_copy(tmp_path: Path, small_disk: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    assert clone_tree({"a.json": tmp_path / "a"}, small_disk / "clone") == {"a.json": "copy"}
    assert files_of(small_disk / "clone") == {"a.json": b"weights"}


def test_a_clone_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(CannotWrite, match="No such file"):
        clone_tree({"a.json": tmp_path / "a", "b.json": tmp_path / "gone"}, tmp_path / "clone")
    with pytest.raises(CorruptCheckpoint):
        clone_tree({"../a.json": tmp_path / "a"}, tmp_path / "clone")
    assert not (tmp_path / "clone").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(CannotWrite, match="exists"):
        clone_tree({"a.json": tmp_path / "a"}, tmp_path / "there")
    assert (tmp_path / "there").exists()


def test_the_partial_folder_is_hidden_beside_the_target(tmp_path: Path) -> None:
    assert partial_path(tmp_path / "out") == tmp_path / ".out.partial"
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with CheckpointWriter.create(tmp_path / "link", TENSORS) as writer:
        assert writer.path == partial_path(tmp_path / "link") == tmp_path / ".elsewhere.partial"
    writer = CheckpointWriter.create(tmp_path / "link", TENSORS)
    writer.discard()
    (tmp_path / "link").unlink()


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / ".out.partial").symlink_to(tmp_path / "precious", target_is_directory=True)
    with pytest.raises(CannotWrite, match="cannot be written"):
        CheckpointWriter.create(tmp_path / "out", TENSORS)
    assert list((tmp_path / "precious").iterdir()) == []


def test_a_name_too_long_for_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="File name too long"):
        CheckpointWriter.create(tmp_path / ("x" * 250), TENSORS)
    assert list(tmp_path.iterdir()) == []
