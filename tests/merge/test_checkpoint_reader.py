"""Checkpoints on disk: read, measured in one pass, and never believed twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from merge_core.checkpoint import merkle
from merge_core.checkpoint.header import Span, read_header
from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.published import INDEX
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource, file_digest, measure
from merge_core.digest import sha256
from merge_core.errors import CorruptCheckpoint

CONFIG = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
MIB = 1 << 20


def model(directory: Path, tensors: Mapping[str, np.ndarray], *, shards: int = 1) -> Path:
    """A checkpoint that the public library wrote."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    names = sorted(tensors)
    homes = {name: f"model-{i % shards + 1}.safetensors" for i, name in enumerate(names)}
    if shards == 1:
        homes = dict.fromkeys(names, "model.safetensors")
    else:
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    for file in set(homes.values()):
        save_file({n: tensors[n] for n in names if homes[n] == file}, directory / file)
    return directory


def place(directory: Path, tensor: str) -> tuple[str, Span]:
    """The weight file that holds a tensor, and where in it."""
    headers = {path.name: read_header(path).tensors for path in directory.glob("*.safetensors")}
    return next((file, tensors[tensor]) for file, tensors in headers.items() if tensor in tensors)


def weights(seed: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "model.embed_tokens.weight": rng.standard_normal((640, 1024)).astype(np.float32),  # 2.5 MiB
        "model.norm.weight": rng.standard_normal(64).astype(np.float16),
        "model.empty": np.zeros((0, 4), np.float32),
        "position_ids": np.arange(MIB // 8, dtype=np.int64),  # one leaf to the byte
    }


def test_headers_alone_are_enough_to_open(tmp_path: Path) -> None:
    with Checkpoint.open(model(tmp_path, weights())) as checkpoint:
        assert list(checkpoint.tensors) == sorted(weights())
        assert checkpoint.tensors["model.norm.weight"].shape == (64,)
        assert checkpoint.tensors["model.norm.weight"].dtype == "F16"
        assert checkpoint.config == CONFIG
        assert checkpoint.architecture == "LlamaForCausalLM"
        assert checkpoint.functional_files() == {"config.json": json.dumps(CONFIG).encode()}
        status = (tmp_path / "model.safetensors").stat()
        stamp = checkpoint.stamps["model.safetensors"]
        assert (stamp.inode, stamp.size, stamp.mtime_ns) == (
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
        )


@pytest.mark.parametrize("shards", [1, 3])
def test_every_byte_comes_out_as_the_library_wrote_it(tmp_path: Path, shards: int) -> None:
    tensors = weights()
    with Checkpoint.open(model(tmp_path, tensors, shards=shards)) as checkpoint:
        for name, value in tensors.items():
            assert bytes(checkpoint.read_bytes(name, 0, value.nbytes)) == value.tobytes()
            file, span = place(tmp_path, name)
            assert (tmp_path / file).read_bytes()[span.begin : span.end] == value.tobytes()
        buffer = memoryview(bytearray(16))
        view = checkpoint.read_bytes("position_ids", 8, 8, into=buffer)
        assert bytes(view) == bytes(buffer[:8]) == (1).to_bytes(8, "little")
        with pytest.raises(ValueError, match="outside"):
            checkpoint.read_bytes("model.norm.weight", 120, 9)
        with pytest.raises(KeyError):
            checkpoint.read_bytes("model.nothing", 0, 1)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_descriptors_are_closed(tmp_path: Path) -> None:
    model(tmp_path, weights(), shards=3)
    before = open_files()
    with Checkpoint.open(tmp_path):
        assert open_files() == before + 3
    assert open_files() == before
    (tmp_path / "config.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"no config\.json"):
        Checkpoint.open(tmp_path)
    assert open_files() == before


def test_the_name_of_a_model_does_not_depend_on_its_files(tmp_path: Path) -> None:
    with (
        Checkpoint.open(model(tmp_path / "one", weights())) as one,
        Checkpoint.open(model(tmp_path / "three", weights(), shards=3)) as three,
        Checkpoint.open(model(tmp_path / "other", weights(seed=8))) as other,
    ):
        names = {measure(c, threads=t).manifest.model_id for c in (one, three) for t in (1, 2, 5)}
        assert len(names) == 1
        assert measure(other).manifest.model_id not in names


def test_a_measurement_proves_itself(tmp_path: Path) -> None:
    seen: list[int] = []
    tensors = weights()
    with Checkpoint.open(model(tmp_path, tensors)) as checkpoint:
        measured = measure(checkpoint, on_progress=seen.append)
    manifest = measured.manifest
    assert Manifest.parse(manifest.to_bytes()) == manifest
    assert LeafTable.parse(manifest, measured.leaves.to_bytes()) == measured.leaves
    assert sum(seen) == manifest.size == sum(value.nbytes for value in tensors.values())
    assert manifest.files[0].sha256 == sha256((tmp_path / "config.json").read_bytes())
    raw = tensors["model.embed_tokens.weight"].tobytes()
    leaves = [merkle.leaf_digest(raw[i : i + MIB]) for i in range(0, len(raw), MIB)]
    assert list(measured.leaves["model.embed_tokens.weight"]) == leaves
    assert measured.leaves["model.empty"] == (merkle.leaf_digest(b""),)
    assert len(measured.leaves["position_ids"]) == 1


def test_verified_reads_give_any_bytes_of_a_tensor(tmp_path: Path) -> None:
    tensors = weights()
    raw = tensors["model.embed_tokens.weight"].tobytes()
    with Checkpoint.open(model(tmp_path, tensors)) as checkpoint:
        source = VerifiedSource(checkpoint, measure(checkpoint).leaves)
        assert source.tensors == checkpoint.tensors
        assert bytes(source.read("model.embed_tokens.weight", MIB - 8, 16)) == raw[MIB - 8 : MIB + 8]
        assert bytes(source.read("model.embed_tokens.weight", 0, len(raw))) == raw
        assert bytes(source.read("model.embed_tokens.weight", 2 * MIB, len(raw) - 2 * MIB)) == raw[2 * MIB :]
        assert bytes(source.read("model.empty", 0, 0)) == b""
        assert bytes(source.read("model.embed_tokens.weight", len(raw), 0)) == b""
        for offset, length in ((len(raw), 1), (0, len(raw) + 1), (-1, 1), (0, -1)):
            with pytest.raises(ValueError, match="bytes"):
                source.read("model.embed_tokens.weight", offset, length)
            fresh = VerifiedSource(checkpoint, measure(checkpoint).leaves)
            with pytest.raises(ValueError, match="bytes"):
                fresh.read("model.embed_tokens.weight", offset, length)


@given(st.integers(0, 640 * 4096 - 1), st.integers(0, 7))
@settings(max_examples=25, deadline=None)
def test_any_flipped_bit_is_found_in_its_leaf(
    damaged_model: tuple[Path, LeafTable], at: int, bit: int
) -> None:
    directory, leaves = damaged_model
    name = "model.embed_tokens.weight"
    with Checkpoint.open(directory) as checkpoint:
        file, span = place(directory, name)
        with (directory / file).open("r+b") as opened:
            _flip(opened.fileno(), span.begin + at, bit)
            try:
                source = VerifiedSource(checkpoint, leaves)
                with pytest.raises(CorruptCheckpoint, match=f"leaf {at // MIB} of {name}") as caught:
                    source.read(name, 0, source.tensors[name].length)
                assert caught.value.hint.startswith("weft verify")
                with pytest.raises(CorruptCheckpoint):
                    source.read(name, at, 1)
                for leaf in {0, 1, 2} - {at // MIB}:
                    source.read(name, leaf * MIB, 4096)
            finally:
                _flip(opened.fileno(), span.begin + at, bit)


@pytest.fixture(scope="module")
def damaged_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LeafTable]:
    directory = model(tmp_path_factory.mktemp("damaged"), weights())
    with Checkpoint.open(directory) as checkpoint:
        return directory, measure(checkpoint).leaves


def _flip(descriptor: int, at: int, bit: int) -> None:
    (byte,) = os.pread(descriptor, 1, at)
    os.pwrite(descriptor, bytes([byte ^ 1 << bit]), at)


def test_a_leaf_table_of_another_model_is_refused(tmp_path: Path) -> None:
    with Checkpoint.open(model(tmp_path, weights())) as checkpoint:
        digest = merkle.leaf_digest(b"")
        with pytest.raises(CorruptCheckpoint, match="does not belong"):
            VerifiedSource(checkpoint, LeafTable({name: [digest] for name in checkpoint.tensors}))
        with pytest.raises(CorruptCheckpoint, match="does not belong"):
            VerifiedSource(checkpoint, LeafTable({}))


def test_a_file_that_shrinks_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    with Checkpoint.open(model(tmp_path, weights())) as checkpoint:
        os.truncate(tmp_path / "model.safetensors", 2 * MIB)
        with pytest.raises(CorruptCheckpoint, match="shorter"):
            measure(checkpoint)


def test_a_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    model(tmp_path, weights(), shards=3)
    file = tmp_path / "model-1.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CorruptCheckpoint, match=r"model-1\.safetensors: .* the file at byte"):
        Checkpoint.open(tmp_path)


def test_an_index_that_disagrees_with_the_headers_is_refused(tmp_path: Path) -> None:
    model(tmp_path, weights(), shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    homes = index["weight_map"]
    swapped = {**homes, "model.norm.weight": homes["model.empty"]}
    for lie in (swapped, {**homes, "more": "model-1.safetensors"}, {k: homes[k] for k in list(homes)[:3]}):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": lie}))
        with pytest.raises(CorruptCheckpoint, match=r"index\.json says"):
            Checkpoint.open(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    model(tmp_path, weights(), shards=2)
    (tmp_path / "model-1.safetensors").write_bytes((tmp_path / "model-2.safetensors").read_bytes())
    with pytest.raises(CorruptCheckpoint, match="two weight files"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"[]",
        b"{",
        b"{}",
        b"\xff",
        b'{"architectures":[]}',
        b'{"architectures":[7]}',
        b"[" * 100_000,
        b'{"architectures":["' + b"x" * 129 + b'"]}',
        b'{"model_type":"a\\u001b[2J"}',
        b" " * (4 << 20) + b"{}",
    ],
)
def test_a_config_that_says_nothing_is_refused(tmp_path: Path, config: bytes) -> None:
    model(tmp_path, weights())
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        Checkpoint.open(tmp_path)


def test_nothing_that_a_checkpoint_contains_is_imported_or_run(tmp_path: Path) -> None:
    model(tmp_path, weights())
    canary = tmp_path / "ran"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')")
    (tmp_path / "config.json").write_text(
        json.dumps({**CONFIG, "auto_map": {"AutoModelForCausalLM": "modeling_evil.Model"}})
    )
    with Checkpoint.open(tmp_path) as checkpoint:
        measure(checkpoint)
        assert [item.name for item in checkpoint.survey.left_out] == ["modeling_evil.py"]
    assert not canary.exists()


def test_one_file_is_digested_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"weft" * MIB)
    seen: list[int] = []
    assert file_digest(path, seen.append) == sha256(path.read_bytes()).hex
    assert sum(seen) == 4 * MIB


def changed(path: Path) -> None:
    """Flip a bit of the last tensor, and put the time of the last write back."""
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=times)


def test_a_file_that_is_as_it_was_hashed_is_believed_and_any_other_is_hashed_again(
    save: Callable[..., Path], weights: Callable[..., torch.Tensor]
) -> None:
    directory = save("m", {"model.norm.weight": weights("m", 4096)})
    with Checkpoint.open(directory) as checkpoint:
        leaves, hashed = measure(checkpoint).leaves, tuple(checkpoint.stamps.values())
        source = VerifiedSource(checkpoint, leaves, hashed=hashed)
        assert len(source.read("model.norm.weight", 8, 64)) == 64
        changed(directory / "model.safetensors")
        with pytest.raises(CorruptCheckpoint, match="not what was published"):
            source.read("model.norm.weight", 8, 64)
    with Checkpoint.open(directory) as checkpoint, pytest.raises(CorruptCheckpoint):
        VerifiedSource(checkpoint, leaves, hashed=hashed).read("model.norm.weight", 8, 64)


def test_a_leaf_that_was_verified_is_hashed_again_once_its_file_was_written_to(
    save: Callable[..., Path], weights: Callable[..., torch.Tensor]
) -> None:
    directory = save("m", {"model.norm.weight": weights("m", 4096)})
    with Checkpoint.open(directory) as checkpoint:
        source = VerifiedSource(checkpoint, measure(checkpoint).leaves)
        assert source.read("model.norm.weight", 8, 64) == source.read("model.norm.weight", 8, 64)
        changed(directory / "model.safetensors")
        with pytest.raises(CorruptCheckpoint, match="not what was published"):
            source.read("model.norm.weight", 8, 64)
