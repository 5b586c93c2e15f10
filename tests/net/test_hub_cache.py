"""A hub id is found where the hub's own tools put it; what was never downloaded is named with its command."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from merge_core.recipe import parse as parse_recipe
from node.errors import NotEnoughPeers
from node.merging import hub
from node.merging.hub import HubModel
from node.merging.references import LocalDirectory, Named, absolute, is_local, nowhere_here, parse_reference

COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two commits of one model, as a download leaves it: blobs, links, refs."""
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    home = folder / "models--org--tiny.model"
    for commit, refs in ((COMMIT, ["main"]), (OLDER, ["v1.0", "refs/pr/3"])):
        (home / "blobs").mkdir(parents=True, exist_ok=True)
        (home / "blobs" / commit[:8]).write_text("{}")
        (home / "snapshots" / commit).mkdir(parents=True)
        (home / "snapshots" / commit / "config.json").symlink_to(f"../../blobs/{commit[:8]}")
        for ref in refs:
            (home / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
            (home / "refs" / ref).write_text(commit)
    return folder


@pytest.mark.parametrize(
    ("text", "revision", "commit"),
    [
        ("org/tiny.model", None, COMMIT),
        ("org/tiny.model@main", "main", COMMIT),
        ("org/tiny.model@v1.0", "v1.0", OLDER),
        ("org/tiny.model@refs/pr/3", "refs/pr/3", OLDER),
        (f"org/tiny.model@{OLDER}", OLDER, OLDER),
    ],
)
def test_it_lies_where_the_hubs_own_library_finds_it(
    text: str, revision: str | None, commit: str, cache: Path, tmp_path: Path
) -> None:
    found = parse_reference(text, tmp_path)
    assert isinstance(found, LocalDirectory) and found.path.name == commit
    theirs = snapshot_download("org/tiny.model", revision=revision, cache_dir=cache, local_files_only=True)
    assert found.path == Path(theirs)
    assert hub.origin(found.path) == HubModel(repository="org/tiny.model", revision=commit)
    assert (found.path / "config.json").read_text() == "{}"


def test_a_directory_of_that_name_comes_first(tmp_path: Path) -> None:
    (tmp_path / "org" / "tiny.model").mkdir(parents=True)
    found = parse_reference("org/tiny.model", tmp_path)
    assert found == LocalDirectory(tmp_path / "org" / "tiny.model") and hub.origin(found.path) is None


def test_what_was_never_downloaded_is_a_name_and_the_hint_brings_it(tmp_path: Path) -> None:
    for text, command in (
        ("org/other", "hf download org/other"),
        ("org/tiny.model@v2", "hf download org/tiny.model --revision v2"),
    ):
        assert parse_reference(text, tmp_path) == Named(text)
        error = nowhere_here(text)
        assert isinstance(error, NotEnoughPeers) and error.hint == command and text in error.why
    assert "hf " not in nowhere_here("a-name").hint


@pytest.mark.parametrize(
    "text",
    ["name", "a/b/c", "../x", "org/..", "./org", "org/a--b", "org/x@", "org/x@../../etc", "org/x y", "@main"],
)
def test_what_is_no_hub_id_is_not_looked_up(text: str) -> None:
    assert hub.parse(text) is None


def test_a_ref_that_holds_no_commit_leads_nowhere(cache: Path, tmp_path: Path) -> None:
    ref = cache / "models--org--tiny.model" / "refs" / "main"
    for data in (b"../../../../etc", b"\xff\xfe", b"", b"c" * 40):
        ref.write_bytes(data)
        assert parse_reference("org/tiny.model", tmp_path) == Named("org/tiny.model")


def test_the_cache_is_found_by_the_variables_of_its_tools(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HubModel(repository="org/tiny.model")
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nowhere"))
    assert hub.find(model) is None
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert hub.find(model) is not None
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "huggingface").mkdir()
    cache.rename(tmp_path / "huggingface" / "hub")
    assert hub.find(model) is not None


def test_a_recipe_of_hub_ids_needs_no_node_and_is_spelled_absolutely(tmp_path: Path) -> None:
    recipe = parse_recipe(
        "merge_method: linear\nmodels:\n"
        "  - {model: org/tiny.model, parameters: {weight: 1}}\n"
        "  - {model: org/tiny.model@v1.0, parameters: {weight: 1}}\n"
    )
    assert is_local(recipe, tmp_path)
    spelled = absolute(recipe, tmp_path)
    assert [Path(model).name for model in spelled.models] == [COMMIT, OLDER]
    assert is_local(spelled, tmp_path) and all(hub.origin(Path(model)) for model in spelled.models)
