"""The control API: nobody without the token, typed errors, health and reflection for tools."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from merge_core.evolution.genome import Shape
from node import app, daemon
from node.config import Config
from node.control import running
from node.control.client import ControlClient
from node.control.server import Services
from node.control.status import ControlError
from node.domain.ticket import Ticket
from node.errors import NodeNotRunning, VerificationFailed
from node.home import Home
from node.merging.evolve import Search
from node.network.memory import Fabric, MemoryNetwork
from node.wire.v1 import control_pb2 as pb
from node.wire.v1 import control_pb2_grpc


@dataclass(frozen=True)
class Up:
    """A node that runs in this process, with everything real but libp2p."""

    home: Home
    services: Services
    stopped: asyncio.Event


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def up(tmp_path: Path) -> AsyncIterator[Up]:
    home, stopped = Home(tmp_path / "home"), asyncio.Event()
    identity = app.initialise(home, now=time.time())
    settings = Config(network="test", peer_api="127.0.0.1:0", control_api="127.0.0.1:0")
    network = MemoryNetwork(Fabric(), identity.peer_id)
    with running.alone(home):
        async with daemon.running_node(
            home, settings, identity, network, stop=stopped.set, clock=time.time
        ) as services:
            yield Up(home, services, stopped)


async def ask(up: Up, question: Any) -> Any:
    """Ask as the command line does, from a thread of its own."""

    def run() -> Any:
        with ControlClient.connect(up.home) as node:
            return question(node)

    return await asyncio.to_thread(run)


@pytest.mark.anyio
async def test_it_says_who_and_where_it_is(up: Up) -> None:
    status = await ask(up, lambda node: node.status())
    assert status.peer_id == up.services.identity.peer_id
    assert status.network == "test"
    assert list(status.addresses) == list(up.services.network.addresses())
    assert up.home.token.stat().st_mode & 0o777 == 0o600


@pytest.mark.anyio
@pytest.mark.parametrize("token", [None, "", "Bearer ", "Bearer wrong", "right but no bearer"])
async def test_without_the_token_every_call_is_refused(up: Up, token: str | None) -> None:
    service = pb.DESCRIPTOR.services_by_name["Node"]
    sent = () if token is None else (("authorization", token),)
    async with grpc.aio.insecure_channel(running.require(up.home).control_api) as channel:
        stub = control_pb2_grpc.NodeStub(channel)
        for method in service.methods:
            call = getattr(stub, method.name)(getattr(pb, method.input_type.name)(), metadata=sent)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await (call.read() if method.server_streaming else call)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED, method.name
    assert not up.stopped.is_set()


@pytest.mark.anyio
async def test_a_wrong_token_is_explained_to_the_person(up: Up) -> None:
    up.home.token.write_text("another")
    with pytest.raises(VerificationFailed, match="token") as refused:
        await ask(up, lambda node: node.status())
    assert refused.value.hint


@pytest.mark.anyio
async def test_tools_find_health_and_reflection_without_a_token(up: Up) -> None:
    async with grpc.aio.insecure_channel(running.require(up.home).control_api) as channel:
        healthy = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="weft.v1.Node")
        )
        assert healthy.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = await anext(aiter(stub.ServerReflectionInfo(iter([asked]))))
    assert "weft.v1.Node" in {service.name for service in answer.list_services_response.service}


@pytest.mark.anyio
async def test_errors_keep_their_class_their_hint_and_their_exit_code(up: Up) -> None:
    with pytest.raises(ControlError, match="merge_method") as bad_recipe:
        await ask(up, lambda node: node.plan("models: []"))
    assert (bad_recipe.value.kind, bad_recipe.value.exit_code) == ("InvalidRecipe", 2)
    with pytest.raises(ControlError) as unknown:
        await ask(up, lambda node: node.start_get("sha256:00"))
    assert (unknown.value.kind, unknown.value.exit_code) == ("NotEnoughPeers", 4)
    assert unknown.value.hint == "weft search"
    with pytest.raises(ControlError) as no_job:
        await ask(up, lambda node: node.cancel("nope"))
    assert no_job.value.hint == "weft jobs ls"


@pytest.mark.anyio
async def test_an_invite_names_this_network_and_this_peer(up: Up) -> None:
    ticket = Ticket.parse(await ask(up, lambda node: node.invite()))
    assert (ticket.network, ticket.peer) == ("test", up.services.identity.peer_id)


@pytest.mark.anyio
async def test_a_ticket_for_another_network_is_refused(up: Up) -> None:
    other = Ticket(network="elsewhere", addresses=up.services.network.addresses())
    with pytest.raises(ControlError, match="elsewhere"):
        await ask(up, lambda node: node.join(str(other)))


@pytest.mark.anyio
async def test_shutdown_is_asked_for_not_forced(up: Up) -> None:
    await ask(up, lambda node: node.shutdown())
    await asyncio.wait_for(up.stopped.wait(), 5)


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".*")]


RECIPE = """
merge_method: task_arithmetic
base_model: base
models: [{model: math, parameters: {weight: 1.0}}]
"""


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tasks": ["words.jsonl"]}, "not an absolute path"),
        ({"reported": ["words.jsonl"]}, "not an absolute path"),
        ({"tasks": []}, "1 to 256 tasks"),
        ({"budget": 0}, "counts"),
        ({"seed": -1}, "counts"),
        ({"layers": -1}, "counts"),
    ],
)
async def test_a_search_that_cannot_be_is_no_job(
    up: Up, tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    asked = Search(tasks=("rev:dev",), shape=Shape()).to_json() | change
    with pytest.raises(ControlError, match=why) as refused:
        await ask(up, lambda node: node.start_evolve(RECIPE, tmp_path / "out", asked))
    assert refused.value.exit_code == 2
    assert await ask(up, lambda node: node.jobs()) == []


@pytest.mark.anyio
async def test_a_search_for_a_mistyped_task_fails_before_anything_is_asked_or_written(
    up: Up, tmp_path: Path
) -> None:
    asked = Search(tasks=("rev:tset",), shape=Shape(layers=1), layers=2, budget=30).to_json()
    job = await ask(up, lambda node: node.start_evolve(RECIPE, tmp_path / "out", asked))
    ended = (await ask(up, lambda node: list(node.watch(job.id))))[-1]
    assert (ended.kind, ended.state) == (pb.JOB_KIND_EVOLVE, pb.JOB_STATE_FAILED)
    assert (ended.error.reason, ended.error.exit_code) == ("InvalidTask", 2)
    assert "did you mean rev:test?" in ended.error.why
    assert hidden(tmp_path) == []
    with pytest.raises(ControlError, match="no search that goes on"):
        await ask(up, lambda node: node.settle(job.id))
    other = asked | {"budget": 31}
    with pytest.raises(ControlError, match="has another budget"):
        await ask(up, lambda node: node.start_evolve(RECIPE, tmp_path / "out", other, resume=True))
    again = await ask(up, lambda node: node.start_evolve(RECIPE, tmp_path / "out", asked, resume=True))
    assert again.id == job.id


@pytest.mark.anyio
async def test_a_second_node_of_one_home_is_refused(up: Up) -> None:
    from node.errors import LocalError

    with pytest.raises(LocalError, match="runs already"), running.alone(up.home):
        pass


def test_no_node_is_said_so(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert running.find(home) is None
    home.run.parent.mkdir()
    home.run.write_text('{"pid": 1, "control_api": "127.0.0.1:1"}')  # of a node that was killed
    with pytest.raises(NodeNotRunning) as none:
        running.require(home)
    assert none.value.hint == "weft up -d"
