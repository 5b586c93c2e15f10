"""What bad input gets: the exit code of the table, one line why, one command, and nothing left behind."""

from __future__ import annotations

import ast
import errno
import json
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.main import get_command

import node
from node.cli import main

Prepare = Callable[[Path], None]

# A hint is words around a command that a shell runs.
COMMAND = re.compile(r"(^|[ :;(])(weft (--)?[a-z]|(ls|mkdir|chmod|mv|rm|df|ss|cat|kill|hf) )")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command line that must fail: what is prepared, its exit code, what `error:` and `next:` say."""

    words: str
    code: int
    why: str
    then: str
    prepare: Prepare = lambda desk: None


def nothing_but(*names: str) -> Prepare:
    """Make `bad` a directory that holds these files alone."""

    def prepare(desk: Path) -> None:
        (desk / "bad").mkdir()
        for name in names:
            (desk / "bad" / name).write_text("{}")

    return prepare


def truncated(desk: Path) -> None:
    """A download that broke off in the middle of the weights."""
    shutil.copytree(desk / "math", desk / "bad")
    weights = desk / "bad" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])


def cut_in_the_header(desk: Path) -> None:
    """A download that broke off even earlier."""
    truncated(desk)
    weights = desk / "bad" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def overlapping(desk: Path) -> None:
    """A header in which the second tensor begins where the first does."""
    shutil.copytree(desk / "math", desk / "bad")
    weights = desk / "bad" / "model.safetensors"
    data = weights.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    second = sorted(entry["data_offsets"] for entry in entries)[1]
    second[:] = [0, second[1] - second[0]]
    said = json.dumps(header).encode()
    weights.write_bytes(struct.pack("<Q", len(said)) + said + data[8 + size :])


def another_shape(desk: Path) -> None:
    """`bad`: an expert whose every matrix has another shape than those of its base, and one tensor more."""
    shutil.copytree(desk / "math", desk / "bad")
    tensors = {
        "model.embed_tokens.weight": np.zeros((80, 16), dtype=np.float32),
        "model.layers.0.mlp.up_proj.weight": np.zeros((40, 12), dtype=np.float16),
        "model.layers.0.mlp.down_proj.weight": np.zeros((16, 48), dtype=np.float16),
        "model.norm.weight": np.ones(16, dtype=np.float32),
        "model.extra.weight": np.ones(16, dtype=np.float32),
    }
    save_file(tensors, desk / "bad" / "model.safetensors", metadata={"format": "pt"})
    bad_recipe(desk)


def bad_recipe(desk: Path) -> None:
    """A recipe that merges `bad` with `math`."""
    (desk / "bad.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: ./base\nmodels:\n"
        "  - {model: ./math, parameters: {weight: 1.0}}\n  - {model: ./bad, parameters: {weight: 1.0}}\n"
    )


def twin(desk: Path) -> None:
    """`math` under another name."""
    (desk / "twin").symlink_to("math")


def recipe(text: str) -> Prepare:
    """A recipe of these words, in bad.yml."""

    def prepare(desk: Path) -> None:
        (desk / "bad.yml").write_text(text)

    return prepare


def both(*steps: Prepare) -> Prepare:
    """One after the other."""

    def prepare(desk: Path) -> None:
        for step in steps:
            step(desk)

    return prepare


def settings(text: str) -> Prepare:
    """A home with this config.toml."""

    def prepare(desk: Path) -> None:
        home = desk.parent / "home"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(text)

    return prepare


def interrupted(desk: Path) -> None:
    """What a killed merge into `out` leaves."""
    (desk / ".out.weft").mkdir()
    (desk / ".out.weft" / "plan.json").write_text("{}")


def occupied(desk: Path) -> None:
    """Somebody's work where the output belongs."""
    (desk / "out").mkdir()
    (desk / "out" / "thesis.txt").write_text("of a year")


def home_is_a_file(desk: Path) -> None:
    """WEFT_HOME names a file."""
    (desk.parent / "home").write_text("")


MERGE = "merge bad.yml -o out"
NO_BASE = "merge_method: ties\nmodels:\n  - {model: ./math}\n  - {model: ./code}\n"
GONE_BASE = "merge_method: ties\nbase_model: ./gone\nmodels:\n  - {model: ./math}\n  - {model: ./code}\n"
TWICE = "merge_method: linear\nmodels:\n  - {model: ./math}\n  - {model: ../desk/math}\n"
TWIN = "merge_method: linear\nmodels:\n  - {model: ./math}\n  - {model: ./twin}\n"
NAMED = "merge_method: linear\nmodels:\n  - {model: ./math}\n  - {model: somebodys-expert}\n"
NO_DIGEST = "merge_method: linear\nmodels:\n  - {model: ./math}\n  - {model: 'sha256:ab'}\n"
PEER = "12D3KooWRBhwfeP2Y4TCx1SM6s9rUoHhR5STiGwxBhgFRcw3UERE"

CASES = {
    # directories that are no checkpoint
    "merge-empty-directory": Case(
        words=MERGE,
        prepare=both(nothing_but(), bad_recipe),
        code=5,
        why="holds no safetensors",
        then="save_pretrained",
    ),
    "verify-empty-directory": Case(
        words="verify bad", prepare=nothing_but(), code=5, why="holds no safetensors", then="weft get"
    ),
    "verify-no-directory": Case(words="verify gone", code=5, why="not a directory", then="weft get"),
    "lineage-no-directory": Case(words="lineage gone", code=5, why="not a directory", then="ls"),
    "lineage-unpublished": Case(words="lineage math", code=5, why="weft.manifest.json", then="weft add"),
    "merge-no-config": Case(
        words=MERGE,
        prepare=both(
            nothing_but(),
            bad_recipe,
            lambda at: shutil.copy(at / "math/model.safetensors", at / "bad") and None,
        ),
        code=5,
        why="no config.json",
        then="ls",
    ),
    "merge-truncated": Case(
        words=MERGE, prepare=both(truncated, bad_recipe), code=5, why="file at byte 2000", then="weft add"
    ),
    "merge-cut-in-the-header": Case(
        words=MERGE, prepare=both(cut_in_the_header, bad_recipe), code=5, why="truncated", then="weft add"
    ),
    "merge-overlapping": Case(
        words=MERGE, prepare=both(overlapping, bad_recipe), code=5, why="overlap", then="weft add"
    ),
    "merge-pickle": Case(
        words=MERGE,
        prepare=both(nothing_but("pytorch_model.bin", "config.json"), bad_recipe),
        code=5,
        why="pickled weights (pytorch_model.bin)",
        then="safetensors",
    ),
    # models that do not fit
    "merge-other-shapes": Case(
        words=MERGE, prepare=another_shape, code=6, why="and 3 more", then="weft plan RECIPE"
    ),
    "plan-other-shapes": Case(
        words="plan bad.yml", prepare=another_shape, code=6, why="and 3 more", then="weft plan RECIPE"
    ),
    "merge-one-model-twice": Case(
        words=MERGE,
        prepare=recipe(TWICE),
        code=2,
        why="./math and ../desk/math name the same model",
        then="weft plan RECIPE",
    ),
    "merge-one-model-by-two-paths": Case(
        words=MERGE,
        prepare=both(twin, recipe(TWIN)),
        code=6,
        why="are the same model",
        then="weft plan RECIPE",
    ),
    # recipes
    "merge-no-recipe": Case(
        words="merge gone.yml -o out", code=1, why="No such file", then="weft merge --help"
    ),
    "merge-recipe-is-a-directory": Case(
        words="merge math -o out", code=1, why="Is a directory", then="weft merge --help"
    ),
    "merge-recipe-is-no-text": Case(
        words="merge math/model.safetensors -o out", code=1, why="not text", then="weft merge --help"
    ),
    "merge-recipe-is-empty": Case(words=MERGE, prepare=recipe(""), code=2, why="a mapping", then="weft plan"),
    "merge-unknown-method": Case(
        words=MERGE,
        prepare=recipe("merge_method: soup\nmodels:\n  - {model: ./math}\n"),
        code=2,
        why="soup",
        then="weft plan",
    ),
    "merge-states-no-base": Case(
        words=MERGE, prepare=recipe(NO_BASE), code=2, why="base_model", then="weft plan"
    ),
    "merge-base-is-gone": Case(
        words=MERGE, prepare=recipe(GONE_BASE), code=5, why="gone is not a directory", then="ls"
    ),
    "merge-no-digest": Case(
        words=MERGE, prepare=recipe(NO_DIGEST), code=2, why="'sha256:ab'", then="weft search"
    ),
    # places
    "merge-output-exists": Case(
        words="merge recipe.yml -o out", prepare=occupied, code=1, why="out exists", then="out-2"
    ),
    "merge-interrupted": Case(
        words="merge recipe.yml -o out", prepare=interrupted, code=1, why="interrupted", then="--resume"
    ),
    "merge-no-parent": Case(
        words="merge recipe.yml -o a/b", code=1, why="a is not a directory", then="mkdir -p"
    ),
    "merge-unwritable": Case(
        words="merge recipe.yml -o /proc/out", code=1, why="unable to open", then="ls -ld /proc"
    ),
    "export-unwritable": Case(words="id export /proc/me", code=1, why="no identity", then="weft init"),
    # nobody yet
    "add-no-identity": Case(words="add math", code=1, why="no identity", then="weft init"),
    "show-no-identity": Case(words="id show", code=1, why="no identity", then="weft init"),
    "up-no-identity": Case(words="up", code=1, why="no identity", then="weft init"),
    "detached-no-identity": Case(words="up -d", code=1, why="no identity", then="weft init"),
    "publish-no-identity": Case(
        words="merge recipe.yml -o out --publish mine", code=1, why="no identity", then="weft init"
    ),
    "import-no-file": Case(words="id import gone", code=1, why="No such file", then="weft id export"),
    "import-other-file": Case(
        words="id import recipe.yml", code=1, why="not an exported identity", then="weft id export"
    ),
    "rm-unknown": Case(words="rm gone", code=1, why="no expert here is called 'gone'", then="weft ls"),
    # settings
    "home-is-a-file": Case(words="init", prepare=home_is_a_file, code=1, why="File exists", then="ls -ld"),
    "config-no-toml": Case(words="up", prepare=settings("x = ["), code=1, why="config.toml", then="rm "),
    "config-unknown-key": Case(
        words="up", prepare=settings("colour = 'red'"), code=1, why="'colour'; known: network", then="weft up"
    ),
    "config-wrong-kind": Case(
        words="up", prepare=settings("network = 3"), code=1, why="network must be a string", then="rm "
    ),
    "config-wrong-items": Case(
        words="up", prepare=settings("listen = [9350]"), code=1, why="listen must be a list", then="rm "
    ),
    "config-public-control": Case(
        words="up --control-api 0.0.0.0:9352", code=1, why="not a loopback address", then="weft up --help"
    ),
    "config-bad-network": Case(words="up --network Bad!", code=1, why="'Bad!'", then="weft up --help"),
    # no node
    **{
        f"no-node-{words.split()[0]}": Case(words=words, code=3, why="no node is running", then="weft up -d")
        for words in (
            "status",
            "down",
            "peers",
            "invite",
            "search llama",
            "get sha256:00",
            "jobs ls",
            "plan bad.yml",
            MERGE,
        )
    },
    # the command line itself
    "usage-no-such-verb": Case(words="knit", code=2, why="No such command 'knit'", then="weft --help"),
    "usage-no-such-option": Case(words="merge --fast", code=2, why="--fast", then="weft merge --help"),
    "usage-missing-argument": Case(words="merge", code=2, why="Missing argument", then="weft merge --help"),
    "usage-no-verb-of-id": Case(words="id", code=2, why="Missing command", then="weft id --help"),
    "usage-audit": Case(words="verify math --audit half", code=2, why="half", then="--audit full"),
    # choosing by fingerprints
    "sim-alone": Case(words="sim math", code=2, why="one model alone", then="weft partners math"),
    "sim-no-probes": Case(
        words="sim math code --probes ghost", code=2, why="no probe set 'ghost'", then="weft add DIR --probes"
    ),
    "no-node-sim": Case(words="sim math law", code=3, why="law is not on this machine", then="weft up -d"),
    "plan-auto-alone": Case(words="plan --auto math", code=2, why="two models", then="weft partners math"),
    "plan-auto-nowhere": Case(
        words="plan --auto math code -o gone/r.yml", code=1, why="cannot be written", then="ls -ld"
    ),
    "plan-two-recipes": Case(
        words="plan recipe.yml math", code=2, why="one recipe", then="weft plan --auto recipe.yml math"
    ),
    "plan-explains-what": Case(
        words="plan recipe.yml --explain", code=2, why="--explain goes with --auto", then="weft plan --auto"
    ),
    "usage-no-ticket": Case(words="join hello", code=2, why="not a ticket", then="weft invite"),
    "usage-torn-ticket": Case(words="join weft1:xxx", code=2, why="damaged", then="weft invite"),
    "verify-key-is-gone": Case(words="verify math --publisher gone", code=1, why="gone", then="weft id show"),
    "verify-key-is-none": Case(
        words="verify math --publisher recipe.yml", code=1, why="not a P-256 public key", then="weft id show"
    ),
}
for name in ("no-node-plan", "no-node-merge"):
    CASES[name] = Case(**{**CASES[name].__dict__, "prepare": recipe(NAMED)})


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input_gets_one_line_why_and_one_command_and_leaves_nothing(
    case: Case, weft, desk: Path, listing
) -> None:
    case.prepare(desk)
    before = listing(desk)

    said = weft(*case.words.split())

    assert said.code == case.code, said
    assert said.out == ""
    (why,) = re.findall(r"^error: (.+)$", said.err, re.M)
    (then,) = re.findall(r"^next:  (.+)$", said.err, re.M)
    assert case.why in why, why
    assert case.then in then and COMMAND.search(then), then
    assert said.err.splitlines()[-1].startswith("next:")
    assert "Traceback" not in said.err
    assert listing(desk) == before

    told = weft(*case.words.split(), "--json").error

    assert (told["why"], told["hint"], told["exit_code"]) == (why, then, case.code)
    assert listing(desk) == before


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (nothing_but(), "holds no safetensors"),
        (nothing_but("pytorch_model.bin", "config.json"), "pickled weights"),
        (truncated, "file at byte 2000"),
        (overlapping, "overlap"),
    ],
    ids=["empty", "pickle", "truncated", "overlapping"],
)
def test_what_is_no_checkpoint_is_not_added(prepare: Prepare, why: str, weft, desk, listing) -> None:
    assert weft("init").code == 0
    prepare(desk)
    before = listing(desk)

    error = weft("--json", "add", "bad").error

    assert error["exit_code"] == 5 and why in error["why"] and COMMAND.search(error["hint"]), error
    assert listing(desk) == before
    assert not [path for path in (desk.parent / "home/experts").rglob("*") if path.is_file()]
    assert weft("ls", "--json").data == {"experts": []}


def test_every_incompatibility_is_told_at_once(weft, desk: Path) -> None:
    another_shape(desk)
    said = weft("merge", "bad.yml", "-o", "out")
    listed = [line for line in said.err.splitlines() if line.startswith("  - ")]
    for tensor in ("embed_tokens", "up_proj", "down_proj", "extra"):
        assert any(tensor in line for line in listed), (tensor, listed)
    assert not any("model.norm" in line for line in listed)
    problems = weft("merge", "bad.yml", "-o", "out", "--json").error["problems"]
    assert [f"  - {problem}" for problem in problems] == listed


def test_every_fault_of_a_recipe_is_told_at_once(weft, desk: Path) -> None:
    recipe("merge_method: soup\nmodels: 3\ncolour: red\n")(desk)
    error = weft("merge", "bad.yml", "-o", "out", "--json").error
    told = " ".join([error["why"], *error["problems"]])
    assert all(word in told for word in ("soup", "models", "colour")) and "\n" not in error["why"]


def test_json_without_a_verb_is_an_error_and_no_help_page(weft) -> None:
    assert weft("--json").error["hint"] == "weft --help"


def test_what_a_message_quotes_is_printed_as_it_is(weft, desk: Path) -> None:
    """`:ab:` is an emoji and `[red]` a colour to whoever draws the line."""
    said = weft("rm", "sha256:ab:[red]")
    assert "'sha256:ab:[red]'" in said.err


@pytest.mark.parametrize(
    ("error", "code", "why"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 7, "No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x/y"), 7, "/x/y: Disk quota exceeded"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 1, "/x/y: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), 1, "Input/output error"),
    ],
)
def test_what_the_system_refuses_is_one_line_with_its_exit_code(
    error: OSError, code: int, why: str, weft, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("node.app.initialise", refuse)
    told = weft("init", "--json").error
    assert (told["exit_code"], told["why"]) == (code, why)
    assert COMMAND.search(told["hint"]), told


def test_an_identity_is_never_overwritten(weft, desk: Path, listing) -> None:
    home = desk.parent / "home"
    weft("init")
    weft("id", "export", "me.json")
    before = listing(home)
    for words in (("init",), ("id", "import", "me.json")):
        error = weft(*words, "--json").error
        assert "already holds an identity" in error["why"] and error["hint"] == "weft id show"
    assert weft("id", "export", "me.json", "--json").error["why"] == "me.json exists"
    assert listing(home) == before


def test_an_identity_that_others_can_read_is_not_used(weft, desk: Path) -> None:
    weft("init")
    key = desk.parent / "home/identity/host.pem"
    key.chmod(0o644)
    error = weft("id", "show", "--json").error
    assert "can be read by others" in error["why"] and error["hint"] == f"chmod 600 {key}"


def test_every_hint_in_the_source_names_a_verb_that_there_is(weft) -> None:
    verbs = set(get_command(main.app).commands)  # type: ignore[attr-defined]
    root = Path(node.__file__).parents[1]
    hints = [
        (path.name, ast.unparse(keyword.value))
        for top in ("node", "merge_core")
        for path in (root / top).rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg in ("hint", "fix")
    ]
    named = [(where, verb) for where, hint in hints for verb in re.findall(r"\bweft ([a-z]+)", hint)]
    assert len(named) > 100
    assert [(where, verb) for where, verb in named if verb not in verbs] == []


@pytest.mark.parametrize("flag", ["--listen", "--peer-api", "--control-api"])
def test_a_port_in_use_is_named_and_the_node_does_not_start(flag: str, weft, desk: Path) -> None:
    weft("init")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = {
            "--listen": "/ip4/127.0.0.1/tcp/0",
            "--peer-api": "127.0.0.1:0",
            "--control-api": "127.0.0.1:0",
        }
        flags[flag] = flags[flag].removesuffix("0") + str(port)
        done = subprocess.run(
            [sys.executable, "-m", "node.cli", "up", *(word for pair in flags.items() for word in pair)],
            capture_output=True,
            text=True,
            timeout=60,
        )
    (why,) = re.findall(r"^error: (.+)$", done.stderr, re.M)
    (then,) = re.findall(r"^next:  (.+)$", done.stderr, re.M)
    assert (done.returncode, done.stdout) == (1, "") and "Traceback" not in done.stderr
    assert str(port) in why and "in use" in why and COMMAND.search(then), done.stderr
    assert weft("status").code == 3 and not (desk.parent / "home/run/node.json").exists()


def test_a_detached_node_that_cannot_start_says_why(weft, desk: Path) -> None:
    weft("init")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        listen = f"/ip4/127.0.0.1/tcp/{port}"
        error = weft("up", "-d", "--json", "--listen", listen, "--peer-api", "127.0.0.1:0").error
    assert "the node did not start" in error["why"] and str(port) in error["why"]
    assert error["exit_code"] == 1 and COMMAND.search(error["hint"])
    assert weft("status").code == 3
