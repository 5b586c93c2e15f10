"""What the verbs that need no node print and do: data on stdout, the story on stderr, sources left alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

MODEL_ID = re.compile(r"sha256:[0-9a-f]{64}\n")


def test_json_before_the_verb_is_json_after_it(weft, desk: Path) -> None:
    weft("init")
    for words in (["id", "show"], ["ls"], ["plan", "recipe.yml"], ["version"]):
        first, last = weft("--json", *words), weft(*words, "--json")
        assert first.data == last.data
    first, last = weft("--json", "rm", "gone"), weft("rm", "--json", "gone")
    assert first.error == last.error and first.code == last.code == 1


def test_after_a_double_dash_json_is_a_name(weft, desk: Path) -> None:
    said = weft("rm", "--", "--json")
    assert said.out == "" and "no expert here is called '--json'" in said.err


def test_stdout_is_only_data(weft, desk: Path) -> None:
    assert re.fullmatch(r"12D3KooW\w+\n", weft("init").out)
    added = weft("add", "math")
    assert MODEL_ID.fullmatch(added.out) and "announced at the next" in added.err
    exported = weft("id", "export", "me.json")
    assert exported.out == "me.json\n"
    assert weft("rm", "math").out == added.out


@dataclass(frozen=True, kw_only=True)
class Made:
    """One recipe merged twice in `folder`, before `weft init` and after it, and what was there before."""

    folder: Path
    before: set[str]
    unsigned: str
    signed: dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, merging) -> Made:
    """Two merges by the real command, for all tests that only look."""
    folder = tmp_path_factory.mktemp("made")
    merging(folder / "work")
    done: dict[str, Any] = {}
    before = _files(folder / "work")
    for name, words in (
        ("unsigned", "merge recipe.yml -o unsigned"),
        ("init", "init"),
        ("signed", "merge recipe.yml -o signed --json"),
    ):
        done[name] = subprocess.run(
            [sys.executable, "-m", "node.cli", *words.split()],
            cwd=folder / "work",
            env={key: value for key, value in os.environ.items() if not key.startswith("WEFT_")}
            | {"WEFT_HOME": str(folder / "home")},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    assert "It is unsigned" in done["unsigned"].stderr and "weft init" in done["unsigned"].stderr
    assert MODEL_ID.fullmatch(done["unsigned"].stdout)
    return Made(
        folder=folder / "work",
        before=before,
        unsigned=done["unsigned"].stdout.strip(),
        signed=json.loads(done["signed"].stdout)["data"],
    )


@pytest.fixture
def owner(weft, made: Made, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`weft`, as the node that made `signed`."""
    monkeypatch.setenv("WEFT_HOME", str(made.folder.parent / "home"))
    return weft


def publisher_key(made: Made) -> str:
    """The PEM that `signed` carries."""
    record = json.loads((made.folder / "signed/weft.publisher.json").read_text())
    pem: str = next(value for value in record.values() if "PUBLIC KEY" in str(value))
    return pem


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_merge_needs_no_identity_and_leaves_only_its_output(made: Made) -> None:
    records = {
        "mergekit_config.yml",
        *(f"weft.{kind}.json" for kind in ("manifest", "plan", "report", "trace")),
    }
    model = {"README.md", "config.json", "model.safetensors", "tokenizer_config.json"}
    signatures = {"model.sig", "weft.publisher.json", "provenance.dsse.json", "weft.agreements.json"}
    found = _files(made.folder) - made.before
    assert {Path(name).name for name in found if name.startswith("unsigned/")} == records | model
    signed = {Path(name).name for name in found if name.startswith("signed/")}
    assert signed - signatures == records | model and "model.sig" in signed
    assert {name.partition("/")[0] for name in found} == {"unsigned", "signed"}


def test_the_merged_weights_are_those_of_the_formula(made: Made) -> None:
    weights = {
        name: load_file(made.folder / name / "model.safetensors")
        for name in ("base", "math", "code", "unsigned")
    }
    for tensor, base in weights["base"].items():
        math, code = (weights[name][tensor].astype(np.float32) for name in ("math", "code"))
        wanted = base + 1.0 * (math - base) + 0.5 * (code - base)
        merged = weights["unsigned"][tensor]
        assert merged.dtype == base.dtype and np.allclose(merged, wanted, rtol=1e-3, atol=1e-3), tensor


def test_signing_does_not_change_the_model_and_makes_it_verifiable(made: Made, weft) -> None:
    assert made.signed["model_id"] == made.unsigned and made.signed["signed"] is True
    assert weft("verify", made.folder / "signed").code == 0
    refused = weft("verify", made.folder / "unsigned", "--json").error
    assert (refused["exit_code"], "nobody signed" in refused["why"]) == (5, True)
    assert refused["hint"].endswith("unsigned --audit full")
    key = Path("key.pem")
    key.write_text(publisher_key(made))
    assert weft("verify", made.folder / "signed", "--publisher", key).code == 0
    assert weft("verify", made.folder / "unsigned", "--publisher", key).code == 5


def test_a_full_audit_executes_the_merge_again(made: Made, owner) -> None:
    report = owner("verify", made.folder / "signed", "--audit", "full", "--json").data
    checks = {check["name"]: check for check in report["checks"]}
    assert re.fullmatch(r"4 leaves computed again, 0 differ", checks["audit"]["detail"])
    assert {name for name, check in checks.items() if not check["ok"]} <= {"known publisher"}, checks


def test_a_verdict_is_shown_whenever_the_model_is_verified_again(made: Made, owner) -> None:
    owner("verify", made.folder / "signed", "--audit", "full")
    report = owner("verify", made.folder / "signed", "--json").data
    (verdict,) = (check for check in report["checks"] if check["name"] == "verdict")
    assert verdict["ok"] is True and "4 leaves computed again, 0 differ" in verdict["detail"]


def test_a_full_audit_of_an_unsigned_merge_says_what_it_is_worth(made: Made, owner) -> None:
    report = owner("verify", made.folder / "unsigned", "--audit", "full", "--json").data
    checks = {check["name"]: check["ok"] for check in report["checks"]}
    assert checks["audit"] is True and checks["signature"] is None


def test_an_audit_without_the_parents_names_what_is_missing(made: Made, weft) -> None:
    error = weft("verify", made.folder / "signed", "--audit", "full", "--json").error
    assert error["exit_code"] == 4 and "is not on this machine" in error["why"]
    parents = [word for name in ("base", "math", "code") for word in ("--parent", made.folder / name)]
    assert weft("verify", made.folder / "signed", "--audit", "full", *parents).code == 0


def test_the_family_tree_names_the_parents(made: Made, owner) -> None:
    tree = owner("lineage", made.folder / "signed", "--json").data
    assert tree["model_id"] == made.signed["model_id"] and len(tree["parents"]) == 3
    assert "digraph" in owner("lineage", made.folder / "signed", "--dot").out


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "weft.plan.json", "model.sig"])
def test_one_flipped_bit_is_refused(name: str, made: Made, weft) -> None:
    shutil.copytree(made.folder / "signed", "tampered")
    path = Path("tampered") / name
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    said = weft("verify", "tampered", "--json")
    assert said.code == 5 and "✗" in said.err
    assert said.error["hint"] == "fetch it again: weft get ID"
    report = said.error["report"]
    assert report["ok"] is False and any(check["ok"] is False for check in report["checks"])


def test_the_key_of_somebody_else_does_not_verify(made: Made, weft, owner, monkeypatch) -> None:
    keys = {}
    for name, home in (("owner", made.folder.parent / "home"), ("stranger", Path("stranger").absolute())):
        monkeypatch.setenv("WEFT_HOME", str(home))
        weft("init")
        keys[name] = Path(f"{name}.pem")
        keys[name].write_text(weft("id", "show", "--json").data["publisher_key"])
    assert weft("verify", made.folder / "signed", "--publisher", keys["owner"]).code == 0
    assert weft("verify", made.folder / "signed", "--publisher", keys["stranger"]).code == 5


def test_add_never_writes_to_its_source(weft, desk: Path, listing) -> None:
    weft("init")
    source = desk / "math"
    before, times = listing(source), {path: path.stat().st_mtime_ns for path in source.iterdir()}
    for path in source.iterdir():
        path.chmod(0o444)
    source.chmod(0o555)
    try:
        added = weft("add", "math", "--name", "Mathe", "--json").data
    finally:
        source.chmod(0o755)
    assert listing(source) == before
    assert {path: path.stat().st_mtime_ns for path in source.iterdir()} == times
    shared = Path(added["directory"])
    assert {"model.sig", "weft.publisher.json", "weft.manifest.json"} <= {p.name for p in shared.iterdir()}
    assert weft("verify", shared).code == 0
    assert (added["name"], added["licence"]) == ("Mathe", "Apache-2.0")

    weft("rm", "Mathe")
    assert not shared.exists() and listing(source) == before


@pytest.mark.parametrize("flag", ["--licence", "--license"])
def test_a_licence_that_is_stated_counts_before_the_card(flag: str, made: Made, weft) -> None:
    weft("init")
    assert weft("add", made.folder / "math", flag, "mit", "--json").data["licence"] == "MIT"


def test_what_a_person_has_to_judge_is_said_before_and_after_a_merge(weft, desk: Path, merging) -> None:
    merging(desk / "models")
    config = desk / "models" / "base" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "auto_map": {"AutoModel": "m.M"}, "odd_key": 1})
    )
    (desk / "models" / "math" / "vocab.json").write_text("{}")
    recipe = desk / "models" / "recipe.yml"
    text = recipe.read_text()
    for name in ("base", "math", "code"):
        text = re.sub(rf"(model: )(\./)?{name}\b", rf"\g<1>{desk}/models/{name}", text)
    recipe.write_text(text)
    warnings = weft("plan", recipe, "--json").data["warnings"]
    assert any("odd_key" in w for w in warnings) and any("tokenizer" in w for w in warnings)
    assert "odd_key" in weft("plan", recipe).out
    merged = weft("merge", recipe, "-o", "out")
    assert (
        "odd_key" in merged.err
        and not {"odd_key", "auto_map"} & json.loads(Path("out/config.json").read_text()).keys()
    )


def test_an_exported_identity_is_the_same_peer_elsewhere(weft, desk: Path, monkeypatch) -> None:
    peer = weft("init").out
    weft("id", "export", "me.json", "--passphrase", "horse")
    assert (desk / "me.json").stat().st_mode & 0o777 == 0o600
    assert "PRIVATE" not in (desk / "me.json").read_text()

    monkeypatch.setenv("WEFT_HOME", str(desk.parent / "elsewhere"))
    assert weft("id", "import", "me.json").code == 1
    assert weft("id", "import", "me.json", "--passphrase", "horse").out == peer
    assert weft("id", "show", "--json").data["peer_id"] == peer.strip()
    for key in (desk.parent / "elsewhere/identity").iterdir():
        assert key.stat().st_mode & 0o777 == 0o600


def test_doctor_says_what_is_wrong_and_its_fix(weft, desk: Path) -> None:
    assert weft("doctor", "--json").error["hint"] == "weft init"
    weft("init")
    checks = {check["name"]: check for check in weft("doctor", "--json").data["checks"]}
    assert checks["identity"]["ok"] and checks["node"] == {
        "name": "node",
        "ok": None,
        "detail": "not running",
        "fix": "weft up -d",
    }
    assert weft("doctor", "--healthy").code == 1


def test_the_real_command_ends_as_the_function_does(desk: Path) -> None:
    """The script, the module and the exit codes that a shell sees."""
    script = Path(sys.executable).parent / "weft"
    for command in ([str(script)], [sys.executable, "-m", "node.cli"]):
        done = subprocess.run([*command, "ls", "--json"], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout) == {"schema": "weft.cli/v1", "ok": True, "data": {"experts": []}}
        done = subprocess.run([*command, "status"], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr == "error: no node is running here\nnext:  weft up -d\n"


def test_colour_and_width_do_not_reach_a_pipe(desk: Path) -> None:
    environment = os.environ | {"COLUMNS": "40", "TERM": "xterm-256color"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "node.cli",
            "merge",
            "gone/with/a/rather/long/name/so/that/it/wraps.yml",
            "-o",
            "o",
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert "\x1b" not in done.stderr and len(done.stderr.splitlines()) == 2


HEAVY = ("torch", "libp2p", "trio", "transformers", "numba", "node.control.server", "node.daemon")
LOADS = """
import sys
from node.cli import main
code = main.run(sys.argv[1:])
print("loaded:", [name for name in {heavy!r} if name in sys.modules], code)
"""


def loaded(*words: str) -> str:
    """Which heavy modules a command line has loaded when it ends, and its exit code."""
    script = LOADS.format(heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "id --help",
        "id show --help",
        "merge --help",
        "up --help",
        "jobs watch --help",
        "demo --help",
    ],
)
def test_help_loads_nothing_heavy(words: str) -> None:
    assert loaded(*words.split()) == "loaded: [] 0"


def test_no_help_page_loads_anything_heavy() -> None:
    """All of them in one process: what any one loads is seen at the end."""
    script = """
import sys
from typer.main import get_command
from node.cli import main
for name, verb in get_command(main.app).commands.items():
    assert main.run([name, "--help"]) == 0, name
    for inner in getattr(verb, "commands", {}):
        assert main.run([name, inner, "--help"]) == 0, inner
print("loaded:", [m for m in sys.modules if m.split(".")[0] in ("torch", "libp2p", "trio", "grpc", "numpy")])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_verbs_that_hash_sign_and_ask_load_neither_torch_nor_a_server(desk: Path) -> None:
    for words, code in (("init", 0), ("add math", 0), ("plan recipe.yml", 0), ("status", 3), ("ls", 0)):
        found = loaded(*words.split())
        assert found == f"loaded: [] {code}", (words, found)


def started(*words: str) -> subprocess.Popen[str]:
    """The real command in a session of its own, as a terminal gives it one."""
    return subprocess.Popen(
        [sys.executable, "-m", "node.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(ask: Callable[[], bool]) -> None:
    """Ask until it is so; fails after half a minute."""
    deadline = time.monotonic() + 30
    while not ask():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(pid: int) -> list[str]:
    """The processes whose parent this one is."""
    return (Path("/proc") / str(pid) / "task" / str(pid) / "children").read_text().split()


def test_an_interrupted_merge_says_how_to_go_on_and_does(weft, desk: Path, expert) -> None:
    for seed, name in enumerate(("base", "math", "code")):
        shutil.rmtree(name)
        expert(Path(name), seed, rows=200_000)
    merge = started("merge", "recipe.yml", "-o", "out")
    until(lambda: Path(".out.weft/plan.json").exists() and bool(children(merge.pid)))
    (worker,) = children(merge.pid)
    merge.send_signal(signal.SIGINT)
    out, err = merge.communicate(timeout=30)

    assert (merge.returncode, out) == (130, "") and "Traceback" not in err, err
    assert err.endswith("error: interrupted\nnext:  weft merge RECIPE -o DIR --resume\n")
    assert not (Path("/proc") / worker).exists() and not Path("out").exists()
    assert weft("merge", "recipe.yml", "-o", "out").code == 1
    resumed = weft("merge", "recipe.yml", "-o", "out", "--resume")
    assert MODEL_ID.fullmatch(resumed.out) and list(Path().glob(".*")) == []


def test_a_node_in_the_foreground_ends_with_ctrl_c(weft, desk: Path) -> None:
    weft("init")
    node = started("up", "--listen", "/ip4/127.0.0.1/tcp/0", "--peer-api", "127.0.0.1:0")
    until(lambda: weft("status").code == 0 or node.poll() is not None)
    status = weft("status", "--json").data
    assert status["pid"] == node.pid
    assert all(address.endswith(f"/p2p/{status['peer_id']}") for address in status["addresses"])
    assert weft("doctor", "--healthy").code == 0
    assert weft("add", "math", "--json").data["announced"] is True
    assert [found["name"] for found in weft("search", "--json").data["experts"]] == ["math"]
    assert weft("rm", "math").code == 0 and weft("search", "--json").data == {"experts": []}
    node.send_signal(signal.SIGINT)
    out, err = node.communicate(timeout=30)
    assert (node.returncode, out) == (0, "") and "up  stop with Ctrl-C" in err and "Traceback" not in err
    assert weft("status").code == 3
