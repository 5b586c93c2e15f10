"""Settings: which source wins, what a file keeps, and that a detached node is told all of them."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from node import app, config, daemon
from node.cli import network
from node.cli.main import app as command
from node.config import Config
from node.domain.ticket import Ticket
from node.errors import LocalError
from node.home import Home
from node.identity import keyring

PEER = "12D3KooWDonxqBVySYsyWdFJ2rJHfT6z17JDJ7rHZwSNzF7BPQkx"
ALL = Config(
    network="test",
    listen=("/ip4/127.0.0.1/tcp/0",),
    announce=("/ip4/192.0.2.7/tcp/19350", "/dns4/node.example/tcp/443"),
    peer_api="127.0.0.1:0",
    control_api="127.0.0.1:0",
    bootstrap=(f"/ip4/192.0.2.1/tcp/9350/p2p/{PEER}",),
    probes="zoo",
)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Config.__dataclass_fields__:
        monkeypatch.delenv(f"WEFT_{name.upper()}", raising=False)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    config.save(ALL, tmp_path / "config.toml")
    assert config.load(tmp_path / "config.toml") == ALL


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@example("\U0001f600")
@example('\x7f\x00\x1b"\\\r\n\u2028')
def test_whatever_a_setting_holds_is_written_as_toml(tmp_path: Path, text: str) -> None:
    said = replace(ALL, listen=(f"/{text}",))
    config.save(said, tmp_path / "config.toml")
    assert config.load(tmp_path / "config.toml") == said


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (f'bootstrap = ["/ip4/192.0.2.1/tcp/1/\U0001f600/p2p/{PEER}"]', "not a complete TCP multiaddr"),
        ('bootstrap = ["/ip4/192.0.2.1/tcp/9350"]', "not a complete TCP multiaddr"),
        ('network = "Loud"', "lower-case"),
    ],
)
def test_a_setting_that_cannot_be_says_which_line_to_edit(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'# mine\npeer_api = "127.0.0.1:0"\n{line}\n')
    with pytest.raises(LocalError, match=why) as caught:
        config.load(path)
    assert f"{path}, line 3" in caught.value.why and caught.value.hint == f"edit line 3 of {path}"


def test_joining_says_when_it_leaves_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Home(tmp_path)
    monkeypatch.setenv("WEFT_HOME", str(tmp_path))
    app.initialise(home, now=1.8e9)
    said = []
    for name in ("first", "first", "second"):
        network.join(str(Ticket(network=name, addresses=ALL.bootstrap)))
        said.append("network first" in capsys.readouterr().err)
    assert said == [False, False, True]
    assert config.stored(home.config) == Config(network="second", bootstrap=ALL.bootstrap)


def test_a_flag_beats_the_environment_which_beats_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.toml"
    config.save(ALL, path)
    monkeypatch.setenv("WEFT_ANNOUNCE", "/ip4/192.0.2.8/tcp/1,/ip4/192.0.2.8/tcp/2")
    told = config.load(path, {"announce": None}).announce
    assert told == ("/ip4/192.0.2.8/tcp/1", "/ip4/192.0.2.8/tcp/2")
    assert config.load(path, {"announce": ["/ip4/192.0.2.9/tcp/3"]}).announce == ("/ip4/192.0.2.9/tcp/3",)


def test_a_node_can_join_whatever_network_a_ticket_may_name(tmp_path: Path) -> None:
    ticket = Ticket(network="a_b.c-1", addresses=ALL.bootstrap)
    config.remember(tmp_path / "config.toml", ticket)
    assert config.load(tmp_path / "config.toml").network == "a_b.c-1"


def test_the_environment_stays_out_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path)
    monkeypatch.setenv("WEFT_NETWORK", "envnet")
    monkeypatch.setenv("WEFT_PEER_API", "127.0.0.1:1")
    app.initialise(home, now=1.8e9)
    assert config.load(home.config).network == "envnet"
    assert config.stored(home.config) == Config()
    address = f"/ip4/192.0.2.1/tcp/9350/p2p/{PEER}"
    config.remember(home.config, Ticket(network="theirs", addresses=(address,)))
    assert config.stored(home.config) == Config(network="theirs", bootstrap=(address,))


@pytest.mark.parametrize("address", ["192.0.2.7:9350", "/ip4/192.0.2.7/tcp/9350/p2p/12D3KooW"])
def test_an_announced_address_that_nobody_could_dial_is_refused(address: str) -> None:
    with pytest.raises(LocalError, match="setting"):
        Config(announce=(address,))


def test_a_detached_node_gets_every_setting(tmp_path: Path) -> None:
    up = typer.main.get_command(command).commands["up"]  # type: ignore[attr-defined]
    given = up.make_context("up", app._flags(ALL)).params
    flags = {name: given[name] for name in Config.__dataclass_fields__}
    assert config.load(tmp_path / "none.toml", flags) == ALL


@pytest.mark.anyio
async def test_a_node_behind_a_port_mapping_tells_others_what_to_dial(tmp_path: Path) -> None:
    identity = keyring.create(tmp_path / "identity", time.time())
    async with daemon._network(ALL, identity) as network:
        peer = identity.host.peer_id
        assert network.addresses() == tuple(f"{address}/p2p/{peer}" for address in ALL.announce)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
