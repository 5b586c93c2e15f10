"""Compare a fetch between two nodes with one `curl -o` from a TLS nginx: 512 MiB, one disk, one cipher.

Two node processes, each with its own identity, shelf and peer port; the one fetches an expert from the other
over mutual TLS, verifies every leaf and every file, syncs it to the disk and renames it into place. curl
downloads the same weight file and does none of that. Runs alternate; prints medians in MB/s (10^6 bytes):

    {"weft_mb_s": ..., "curl_mb_s": ..., "ratio": ...}
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from merge_core.checkpoint.manifest import LeafTable, Manifest
from merge_core.checkpoint.reader import Checkpoint, VerifiedSource
from merge_core.digest import Digest, ModelId
from merge_core.simmerge.fingerprint import Fingerprint
from merge_core.simmerge.structural.sketcher import compute
from node.catalog.shelf import Measurable, Shelf, Sketched
from node.domain.ids import PeerId
from node.exchange.fetch import fetch
from node.identity import keyring
from node.identity.certificates import make_certificate
from node.peer.admitted import Admitted
from node.peer.client import Endpoint, PeerClient
from node.peer.server import PeerServer

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "bench-exchange"
CIPHER = "TLS_AES_128_GCM_SHA256"
TENSORS, TENSOR_BYTES = 16, 32 << 20
WEIGHTS = "model.safetensors"


class Everything:
    """Entitlements of a benchmark: the peers that were admitted may have all."""

    def covers(self, peer: PeerId, model_id: ModelId, nbytes: int) -> None:
        """Grant it."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tools() -> None:
    """Make sure of nginx, curl and openssl; exits with the command that installs them."""
    missing = [name for name in ("nginx", "curl", "openssl") if not shutil.which(name, path=search_path())]
    if not missing:
        return
    command = f"apt-get install -y --no-install-recommends {' '.join(missing)}"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        sys.exit(f"{', '.join(missing)} not found; install with: sudo {command}")
    # Run level 1 keeps the package from starting a server of its own on port 80.
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for step in ("apt-get update", command):
        say(f"+ {step}")
        subprocess.run(step.split(), check=True, env=quiet, stdout=subprocess.DEVNULL)


def search_path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"


def sketch(measured: Measurable) -> Sketched:
    """The fingerprint as a worker computes it."""
    leaves = LeafTable.parse(Manifest.parse(measured.manifest.read_bytes()), measured.leaves.read_bytes())
    with Checkpoint.open(measured.directory) as checkpoint:
        structure = compute(VerifiedSource(checkpoint, leaves))
    made = Fingerprint(model_id=measured.model_id, structure=structure, behaviour=None)
    return Sketched(fingerprint=made.to_bytes())


def prepare() -> Path:
    """The home of the node that holds the expert, made once."""
    home = CACHE / "holder"
    if (home / "ready").exists():
        return home
    shutil.rmtree(CACHE, ignore_errors=True)
    source = CACHE / "source"
    source.mkdir(parents=True)
    draw = np.random.default_rng(0)
    tensors = {
        f"model.layers.{i}.weight": draw.standard_normal(TENSOR_BYTES // 4, np.float32)
        for i in range(TENSORS)
    }
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    (source / "config.json").write_text('{"architectures":["LlamaForCausalLM"]}')
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    identity = keyring.create(home / "identity", time.time())
    Shelf(home / "experts").add(source, identity=identity, sketch=sketch, now=time.time())
    shutil.rmtree(source)
    (home / "ready").touch()
    return home


class Child:
    """A node process that answers one line of JSON for each that it gets."""

    def __init__(self, home: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--node", str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.hello = self._answer()

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a node process ended")
        return dict(json.loads(line))

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(10)


async def node(home: Path) -> None:
    """Be a node: serve the shelf, and fetch when told to."""
    identity = (
        keyring.load(home / "identity")
        if (home / "identity").exists()
        else keyring.create(home / "identity", time.time())
    )
    shelf = Shelf(home / "experts")
    certificate = make_certificate(identity.host, time.time())
    admitted = Admitted(clock=time.time)
    server = PeerServer(shelf=shelf, entitlements=Everything(), admitted=admitted, certificate=certificate)
    port = await server.start("127.0.0.1:0")
    experts = [[e.model_id, e.publisher] for e in shelf.experts()]
    tell(peer=identity.peer_id, certificate=certificate.pem.decode(), port=port, experts=experts)
    while line := await asyncio.to_thread(sys.stdin.readline):
        question = json.loads(line)
        peer, pem = PeerId(question["peer"]), question["certificate"].encode()
        admitted.admit(peer, pem)
        if "destination" not in question:
            tell(admitted=peer)
            continue
        client = PeerClient(
            Endpoint(peer=peer, hosts=("127.0.0.1",), port=question["port"], certificate=pem), certificate
        )
        before, began = os.times(), time.perf_counter()
        model, publisher = question["experts"][0]
        fetched = await fetch(
            ModelId(model),
            [client],
            Path(question["destination"]),
            publisher=Digest(publisher),
            clock=time.monotonic,
        )
        seconds, after = time.perf_counter() - began, os.times()
        await client.close()
        cpu = after.user + after.system - before.user - before.system
        tell(seconds=seconds, cpu=cpu, received=sum(fetched.received.values()))
    await server.stop(0)


def tell(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


@contextmanager
def nginx(root: Path, folder: Path) -> Iterator[int]:
    """Serve `root` over TLS 1.3 with one cipher, as nginx does by itself; yields the port."""
    folder.mkdir(parents=True, exist_ok=True)
    options = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    names = "-addext subjectAltName=DNS:localhost -keyout key.pem -out cert.pem"
    command = ["openssl", "req", "-x509", *options.split(), *names.split()]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "nginx.conf").write_text(
        f"""
        daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes auto;
        {"user root;" if os.geteuid() == 0 else ""}
        events {{ worker_connections 64; }}
        http {{
            access_log off; sendfile on; tcp_nopush on;
            client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
            uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
            server {{
                listen 127.0.0.1:{port} ssl; root {root};
                ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;
                ssl_protocols TLSv1.3; ssl_conf_command Ciphersuites {CIPHER};
            }}
        }}"""
    )
    program = shutil.which("nginx", path=search_path())
    server = subprocess.Popen([str(program), "-c", str(folder / "nginx.conf"), "-p", str(folder)])
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield port
    finally:
        server.terminate()
        server.wait(10)


def curl(port: int, folder: Path, out: Path) -> float:
    """Seconds of one download."""
    command = ["curl", "-sS", "--fail", "--tls13-ciphers", CIPHER, "--cacert", str(folder / "cert.pem")]
    command += ["--resolve", f"localhost:{port}:127.0.0.1", "-o", str(out)]
    began = time.perf_counter()
    subprocess.run([*command, f"https://localhost:{port}/{WEIGHTS}"], check=True)
    return time.perf_counter() - began


def settle(*outputs: Path) -> None:
    """Remove what the last run wrote, and let the disk finish."""
    for path in outputs:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    os.sync()


def compare(runs: int) -> dict[str, float]:
    """Alternate both `runs` times after one of each that does not count."""
    tools()
    home = prepare()
    out, got = CACHE / "curl.out", CACHE / "weft.out"
    shutil.rmtree(CACHE / "asker", ignore_errors=True)
    holder, asker = Child(home), Child(CACHE / "asker")
    holder.ask(**{key: asker.hello[key] for key in ("peer", "certificate")})
    directory = next((home / "experts").glob("*/*/model"))
    size = (directory / WEIGHTS).stat().st_size
    rates: dict[str, list[float]] = {"curl": [], "weft": []}
    with nginx(directory, CACHE / "nginx") as port:
        for run in range(runs + 1):
            settle(out, got)
            plain = curl(port, CACHE / "nginx", out)
            assert out.stat().st_size == size
            settle(out, got)
            answer = asker.ask(destination=str(got), **holder.hello)
            assert (got / WEIGHTS).stat().st_size == size and answer["received"] >= size
            say(f"curl {plain:.2f} s, weft {answer['seconds']:.2f} s (cpu {answer['cpu']:.2f} s)")
            if run:
                rates["curl"].append(size / plain / 1e6)
                rates["weft"].append(size / answer["seconds"] / 1e6)
    settle(out, got)
    for child in (asker, holder):
        child.close()
    weft, plain = median(rates["weft"]), median(rates["curl"])
    return {"weft_mb_s": round(weft, 1), "curl_mb_s": round(plain, 1), "ratio": round(weft / plain, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--node", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.node:
        asyncio.run(node(arguments.node))
    else:
        print(json.dumps(compare(arguments.runs)))


if __name__ == "__main__":
    main()
