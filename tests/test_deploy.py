"""What deploy/ says agrees with what the command understands, as far as shows without a container engine."""

import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from node.cli.main import run
from node.config import Config

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
UNIT = (ROOT / "deploy" / "weft.service").read_text()
SETTINGS = {f"WEFT_{field.name.upper()}" for field in fields(Config)} | {"WEFT_HOME"}


def test_the_image_copies_only_what_exists_and_runs_as_nobody_special() -> None:
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources), line
    last_stage = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.search(r"^USER weft$", last_stage, re.MULTILINE)
    assert "HEALTHCHECK" in last_stage
    assert "gcc" not in last_stage


def test_every_setting_in_the_environment_is_one_that_is_read() -> None:
    named = set(re.findall(r"WEFT_[A-Z_]+", DOCKERFILE + UNIT + yaml.safe_dump(COMPOSE)))
    assert named <= SETTINGS


@pytest.mark.parametrize(("verb", "flag"), [("up", "--init"), ("doctor", "--healthy"), ("down", "--help")])
def test_the_commands_they_run_exist(verb: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f'"{verb}", "{flag}"' in DOCKERFILE or f"weft {verb}" in UNIT
    assert run([verb, "--help"]) == 0
    assert flag in capsys.readouterr().out


def test_compose_starts_three_nodes_with_homes_of_their_own() -> None:
    services = COMPOSE["services"]
    assert sorted(services) == ["node1", "node2", "node3"]
    volumes = [service["volumes"] for service in services.values()]
    assert len({str(volume) for volume in volumes}) == 3
    assert all(service["cap_drop"] == ["ALL"] and service["read_only"] for service in services.values())
    assert (ROOT / "deploy" / services["node1"]["build"]["context"]).resolve() == ROOT
    assert (ROOT / services["node1"]["build"]["dockerfile"]).is_file()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_one_that_systemd_understands(tmp_path: Path) -> None:
    # The command of the unit lies where a user would install it: put one that exists there instead.
    unit = tmp_path / "weft.service"
    unit.write_text(UNIT.replace("/usr/local/bin/weft", "/bin/true"))
    verdict = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    complaints = [line for line in verdict.stderr.splitlines() if "weft.service" in line]
    assert not complaints
