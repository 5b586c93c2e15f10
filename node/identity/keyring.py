"""The identity of a node on disk: two private keys and their binding, and one file to carry them elsewhere.

    identity/            0700
      host.pem           0600, Ed25519, PKCS#8
      publisher.pem      0600, P-256, PKCS#8
      publisher.json     0600, the binding (weft.publisher.json of every model)

A folder appears whole or not at all, and is never overwritten. An export is JSON; with a passphrase its
content is sealed with ChaCha20-Poly1305 under a key from scrypt (n = 2^15, r = 8, p = 1).
"""

from __future__ import annotations

import base64
import json
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from merge_core.files import create as write_new
from merge_core.files import sync
from node.domain.ids import PeerId
from node.errors import LocalError, VerificationFailed
from node.identity.binding import Binding, bind
from node.identity.keys import HostKey, PublisherKey

MAX_EXPORT = 64 << 10
_FORMAT = "weft.identity/v1"
_HOST, _PUBLISHER, _BINDING = "host.pem", "publisher.pem", "publisher.json"
_FILES = (_HOST, _PUBLISHER, _BINDING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a node is: its two keys, and the binding that both signed."""

    host: HostKey
    publisher: PublisherKey
    binding: Binding

    @property
    def peer_id(self) -> PeerId:
        """The name of the node in the network."""
        return self.host.peer_id


def create(folder: Path, now: float) -> Identity:
    """Draw both keys, bind them and store them; raises LocalError when `folder` holds anything."""
    host, publisher = HostKey.generate(), PublisherKey.generate()
    identity = Identity(host=host, publisher=publisher, binding=bind(host, publisher, now=now))
    _store(folder, _files(identity))
    return identity


def load(folder: Path) -> Identity:
    """Read an identity; raises LocalError when it is missing, readable by others, or does not fit."""
    return _identity({name: _read(folder / name) for name in _FILES}, str(folder))


def export(folder: Path, *, passphrase: str = "") -> bytes:
    """The whole identity as one file, encrypted if there is a passphrase: whoever opens it is this node."""
    content = {name: data.decode() for name, data in _files(load(folder)).items()}
    if not passphrase:
        return _json({"format": _FORMAT, "content": content})
    salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
    sealed = _cipher(passphrase, salt).encrypt(nonce, _json(content), _FORMAT.encode())
    fields = {"salt": salt, "nonce": nonce, "sealed": sealed}
    return _json(
        {"format": _FORMAT} | {name: base64.b64encode(value).decode() for name, value in fields.items()}
    )


def import_(folder: Path, data: bytes, *, passphrase: str = "") -> Identity:
    """Store what `export` wrote; raises LocalError on another file, a wrong passphrase, a folder in use."""
    content = _content(data, passphrase)
    identity = _identity({name: content[name].encode() for name in _FILES}, "the exported file")
    _store(folder, _files(identity))
    return identity


def _files(identity: Identity) -> dict[str, bytes]:
    return {
        _HOST: identity.host.private_pem,
        _PUBLISHER: identity.publisher.private_pem,
        _BINDING: identity.binding.to_bytes(),
    }


def _identity(files: dict[str, bytes], where: str) -> Identity:
    try:
        identity = Identity(
            host=HostKey.from_pem(files[_HOST]),
            publisher=PublisherKey.from_pem(files[_PUBLISHER]),
            binding=Binding.parse(files[_BINDING]),
        )
    except (ValueError, VerificationFailed) as error:
        raise LocalError(f"damaged identity in {where}: {error}", hint="weft id import FILE") from error
    bound = (identity.binding.peer_id, identity.binding.publisher.key_id)
    if bound != (identity.host.peer_id, identity.publisher.key_id):
        raise LocalError(f"the keys in {where} do not belong together", hint="weft id import FILE")
    return identity


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_mode & 0o077:
            raise LocalError(f"{path} can be read by others", hint=f"chmod 600 {path}")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise LocalError(f"no identity: {path} is missing", hint="weft init") from error
    except OSError as error:
        raise LocalError(
            f"cannot read {path}: {error.strerror}", hint=f"ls -ld {path.parent.parent}"
        ) from error


def _store(folder: Path, files: dict[str, bytes]) -> None:
    """Write all files beside `folder` and rename them into place at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, data in files.items():
            write_new(partial / name, data, mode=0o600)
        sync(partial)
        try:
            partial.rename(folder)  # replaces an empty folder, fails on any other
        except OSError as error:
            raise LocalError(f"{folder} already holds an identity", hint="weft id show") from error
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _content(data: bytes, passphrase: str) -> dict[str, str]:
    try:
        if len(data) > MAX_EXPORT:
            raise ValueError("too large")
        value = json.loads(data)
        if value["format"] != _FORMAT:
            raise ValueError("another format")
        content = value["content"] if "content" in value else _unseal(value, passphrase)
        if not all(isinstance(content[name], str) for name in _FILES):
            raise ValueError("a file of it is not text")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise LocalError("this is not an exported identity", hint="weft id export FILE") from error
    return {name: content[name] for name in _FILES}


def _unseal(value: dict[str, Any], passphrase: str) -> Any:
    salt, nonce, sealed = (base64.b64decode(value[name]) for name in ("salt", "nonce", "sealed"))
    try:
        return json.loads(_cipher(passphrase, salt).decrypt(nonce, sealed, _FORMAT.encode()))
    except InvalidTag as error:
        raise LocalError("the passphrase does not open this identity", hint="weft id import FILE") from error


def _cipher(passphrase: str, salt: bytes) -> ChaCha20Poly1305:
    return ChaCha20Poly1305(Scrypt(salt=salt, length=32, n=2**15, r=8, p=1).derive(passphrase.encode()))


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"
