"""What of a model directory is published, and which names are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.checkpoint.published import (
    INDEX,
    MAX_WEIGHT_FILES,
    check_names,
    name_problem,
    parse_index,
    survey,
)
from merge_core.errors import CorruptCheckpoint


def fill(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).write_bytes(b"{}")
    return directory


def test_a_hub_download_is_sorted_by_kind(tmp_path: Path) -> None:
    fill(tmp_path, "model.safetensors", "config.json", "tokenizer.json", "README.md", "LICENSE", "NOTICE.txt")
    fill(
        tmp_path,
        "model.sig",
        "weft.plan.json",
        "training_args.bin",
        "modeling.py",
        ".gitattributes",
        "x.onnx",
    )
    fill(tmp_path, "adapter.safetensors", "LICENSE.bin")
    (tmp_path / "onnx").mkdir()
    found = survey(tmp_path)
    assert found.weights == ("model.safetensors",)
    assert found.functional == ("config.json", "tokenizer.json")
    assert found.other == ("LICENSE", "NOTICE.txt", "README.md")
    assert found.records == ("model.sig", "weft.plan.json")
    assert {item.name: item.why for item in found.left_out} == {
        ".gitattributes": "hidden",
        "LICENSE.bin": "not of a kind that is published",
        "adapter.safetensors": "not among the weights in use",
        "modeling.py": "not of a kind that is published",
        "onnx": "a folder; the layout is flat",
        "training_args.bin": "not of a kind that is published",
        "x.onnx": "not of a kind that is published",
    }
    assert found.published == tuple(sorted((*found.weights, *found.functional, *found.other)))
    assert found.sizes["README.md"] == 2
    assert found.links == ()


def test_a_hub_cache_of_symlinks_is_followed_and_named(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    fill(blobs, "0a1b", "config")
    (snapshot / "model.safetensors").symlink_to(blobs / "0a1b")
    (snapshot / "config.json").symlink_to(blobs / "config")
    (snapshot / "tokenizer.json").symlink_to(blobs / "gone")
    found = survey(snapshot)
    assert found.weights == ("model.safetensors",)
    assert found.links == ("config.json", "model.safetensors")
    assert [item.name for item in found.left_out] == ["tokenizer.json"]
    assert "cannot be opened" in found.left_out[0].why


def test_a_pipe_in_the_directory_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(fill(tmp_path, "model.safetensors") / "config.json")
    assert survey(tmp_path).functional == ()
    assert survey(tmp_path).left_out[0].why == "not a regular file"


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"only pickled weights \(pytorch_model\.bin\)") as caught:
        survey(fill(tmp_path, "pytorch_model.bin", "config.json"))
    assert "safetensors" in caught.value.hint


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="no safetensors weights"):
        survey(tmp_path)
    with pytest.raises(CorruptCheckpoint, match="is not a directory"):
        survey(tmp_path / "nowhere")


def test_the_index_says_which_weight_files_count(tmp_path: Path) -> None:
    fill(tmp_path, "a.safetensors", "b.safetensors", "old.safetensors")
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert survey(tmp_path).weights == ("a.safetensors", "b.safetensors")
    assert survey(tmp_path).left_out[0].name == "old.safetensors"
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"lacks the weight file a\.safetensors"):
        survey(tmp_path)


def test_several_weight_files_without_an_index_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"lacks the weight file model\.safetensors"):
        survey(fill(tmp_path, "a.safetensors", "b.safetensors"))


@pytest.mark.parametrize(
    "index",
    [
        b"[]",
        b"{}",
        b'{"weight_map":{}}',
        b'{"weight_map":{"x":"../a.safetensors"}}',
        b'{"weight_map":{"x":"/etc/a.safetensors"}}',
        b'{"weight_map":{"x":"a.bin"}}',
        b'{"weight_map":{"x":7}}',
        b'{"weight_map":{"":"a.safetensors"}}',
        b'{"weight_map":{"x":"\\ud800.safetensors"}}',
        b"[" * 100_000,
        b"\xff",
        json.dumps(
            {"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(MAX_WEIGHT_FILES + 1)}}
        ).encode(),
    ],
)
def test_a_bad_index_is_refused(index: bytes) -> None:
    with pytest.raises(CorruptCheckpoint, match="index"):
        parse_index(index)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "a\\b",
        "C:x",
        "con",
        "NUL.txt",
        "Com1.json",
        "a\0",
        "a\n",
        "a ",
        " a",
        "a.",
        ".a",
        "e\u0301.md",
        "\u202etxt.md",
        "x" * 256,
        "ü" * 128,
        "\ud800",
    ],
)
def test_a_name_that_some_system_trips_over_is_refused(name: str) -> None:
    assert name_problem(name)
    with pytest.raises(CorruptCheckpoint, match="refused"):
        check_names([name])


def test_names_that_differ_only_in_case_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"README\.md and readme\.md"):
        survey(fill(tmp_path, "model.safetensors", "README.md", "readme.md"))
    with pytest.raises(CorruptCheckpoint, match="upper and lower"):
        check_names(["straße.md", "STRASSE.md"])


@given(st.text(max_size=12))
@settings(max_examples=300, deadline=None)
def test_an_accepted_name_stays_inside_its_folder(name: str) -> None:
    if name_problem(name) is None:
        assert os.path.normpath(os.path.join("/models/m", name)) == f"/models/m/{name}"  # noqa: PTH118
        assert os.path.basename(name) == name  # noqa: PTH119
