"""Real peer ports in one process: each node with its identity, certificate and server on loopback."""

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource
from merge_core.digest import ModelId
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.structural.sketcher import compute
from node.catalog.expert import Expert
from node.catalog.fingerprint_cache import FingerprintCache
from node.catalog.fingerprints import Known
from node.catalog.shelf import Measurable, Shelf, Sketched
from node.domain.ids import PeerId
from node.domain.reasons import Reason
from node.errors import Refused
from node.identity import keyring
from node.identity.certificates import TlsCertificate, make_certificate
from node.peer.admitted import Admitted
from node.peer.client import Endpoint, PeerClient
from node.peer.server import PeerServer

NOW = 1_800_000_000.0


def sketch(measured: Measurable) -> Sketched:
    """The fingerprint as a worker computes it."""
    leaves = LeafTable.parse(Manifest.parse(measured.manifest.read_bytes()), measured.leaves.read_bytes())
    with Checkpoint.open(measured.directory) as checkpoint:
        structure = compute(VerifiedSource(checkpoint, leaves))
    made = Fingerprint(model_id=measured.model_id, structure=structure, behaviour=None)
    return Sketched(fingerprint=made.to_bytes())


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def write_model(directory: Path, seed: int = 1) -> Path:
    """A checkpoint of 22 MiB: big and tiny tensors, one of odd length, an empty one."""
    directory.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    big = {f"model.layers.{i}.weight": draw.standard_normal(1_310_720, np.float32) for i in range(4)}
    rest = {
        "a.bias": draw.standard_normal(7, np.float32),
        "b.empty": np.zeros((0, 4), np.float16),
        "c.odd": draw.integers(0, 255, 1_500_001, np.uint8),
    }
    save_file({**big, **rest}, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text('{"architectures":["LlamaForCausalLM"]}')
    (directory / "tokenizer.json").write_text('{"model":{}}')
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return directory


@dataclass(frozen=True, kw_only=True)
class Published:
    """An expert on its publisher's shelf."""

    shelf: Shelf
    expert: Expert


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """An expert that its publisher signed."""
    root = tmp_path_factory.mktemp("publisher")
    identity = keyring.create(root / "identity", NOW)
    shelf = Shelf(root / "experts")
    added = shelf.add(write_model(root / "source"), identity=identity, sketch=sketch, now=NOW)
    return Published(shelf=shelf, expert=added.expert)


@dataclass
class Ledger:
    """Entitlements as a list: who may have what, and what was counted."""

    granted: set[tuple[PeerId, ModelId]] = field(default_factory=set)
    counted: int = 0

    def covers(self, peer: PeerId, model_id: ModelId, nbytes: int) -> None:
        if (peer, model_id) not in self.granted:
            raise Refused(Reason.NOT_ENTITLED)
        self.counted += nbytes


@dataclass(kw_only=True)
class Node:
    """One node's peer port."""

    peer: PeerId
    certificate: TlsCertificate
    admitted: Admitted
    ledger: Ledger
    server: PeerServer
    port: int = 0
    now: float = NOW
    banned: set[PeerId] = field(default_factory=set)


@dataclass
class World:
    """Nodes that were started, and the clients between them."""

    folder: Path
    nodes: list[Node] = field(default_factory=list)
    clients: list[PeerClient] = field(default_factory=list)

    async def node(
        self,
        shelf: Any,
        server: Callable[..., PeerServer] = PeerServer,
        *,
        similarity: Any = None,
        host: keyring.HostKey | None = None,
        **options: Any,
    ) -> Node:
        """Start a node that serves from `shelf`, with another certificate each time."""
        host = host or keyring.HostKey.generate()
        certificate = make_certificate(host, time.time())
        ledger = Ledger()
        made: list[Node] = []
        admitted = Admitted(
            clock=lambda: made[0].now if made else NOW, allowed=lambda peer: peer not in made[0].banned
        )
        serving = server(
            shelf=shelf,
            similarity=similarity or Known(shelf, FingerprintCache(self.folder)),
            entitlements=ledger,
            admitted=admitted,
            certificate=certificate,
            **options,
        )
        node = Node(
            peer=host.peer_id, certificate=certificate, admitted=admitted, ledger=ledger, server=serving
        )
        made.append(node)
        node.port = await serving.start("127.0.0.1:0")
        self.nodes.append(node)
        return node

    def client(
        self, asker: Node, holder: Node, *, grant: ModelId | None = None, lanes: int = 2
    ) -> PeerClient:
        """Let two nodes know each other's certificates, and one of them call the other."""
        holder.admitted.admit(asker.peer, asker.certificate.pem)
        if grant:
            holder.ledger.granted.add((asker.peer, grant))
        endpoint = Endpoint(
            peer=holder.peer, hosts=("127.0.0.1",), port=holder.port, certificate=holder.certificate.pem
        )
        client = PeerClient(endpoint, asker.certificate, lanes=lanes)
        self.clients.append(client)
        return client


@pytest.fixture
async def world(anyio_backend: str, tmp_path: Path) -> AsyncIterator[World]:
    """An empty world; whatever was started in it is stopped."""
    made = World(folder=tmp_path / "fingerprints")
    yield made
    for client in made.clients:
        await client.close()
    for node in made.nodes:
        await node.server.stop(0)
