"""The two keys of a node, and the verifiers of other nodes' signatures.

A host key (Ed25519) is the peer's name in the network. A publisher key (P-256) signs models, because OpenSSF
Model Signing takes no Ed25519. Both sign through one small Protocol; `binding` ties them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from merge_core.digest import Digest, sha256
from node.domain.ids import PeerId
from node.errors import VerificationFailed

MAX_PEM = 4096
_PROTOBUF_ED25519 = b"\x08\x01\x12\x20"
_IDENTITY_MULTIHASH = b"\x00\x24"
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_PEER_ID_SIZE = 38


class Signer(Protocol):
    """Whoever can sign bytes under a name."""

    @property
    def key_id(self) -> str:
        """The name that goes with the signature."""
        ...

    def sign(self, data: bytes) -> bytes:
        """Sign bytes."""
        ...


class Verifier(Protocol):
    """Whoever can tell whether a named key signed some bytes."""

    @property
    def key_id(self) -> str:
        """The name under which the signature is looked up."""
        ...

    def verify(self, signature: bytes, data: bytes) -> None:
        """Return when the signature holds; raises VerificationFailed when not."""
        ...


@dataclass(frozen=True, slots=True)
class HostKey:
    """An Ed25519 private key: the peer itself."""

    _private: ed25519.Ed25519PrivateKey

    @classmethod
    def generate(cls) -> HostKey:
        """Draw a new key from the operating system."""
        return cls(ed25519.Ed25519PrivateKey.generate())

    @classmethod
    def from_private_bytes(cls, raw: bytes) -> HostKey:
        """Take the 32 raw private bytes; raises ValueError on another length."""
        return cls(ed25519.Ed25519PrivateKey.from_private_bytes(raw))

    @classmethod
    def from_pem(cls, pem: bytes) -> HostKey:
        """Read unencrypted PKCS#8; raises ValueError on anything but Ed25519."""
        key = _load_private(pem)
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise ValueError("the host key is not an Ed25519 key")
        return cls(key)

    @property
    def private_bytes(self) -> bytes:
        """The 32 raw private bytes."""
        return self._private.private_bytes_raw()

    @property
    def private_pem(self) -> bytes:
        """The private key as unencrypted PKCS#8."""
        return _private_pem(self._private)

    @property
    def peer_id(self) -> PeerId:
        """The name of this peer."""
        return peer_id_of_public(self._private.public_key().public_bytes_raw())

    @property
    def key_id(self) -> str:
        """The peer id."""
        return self.peer_id

    def sign(self, data: bytes) -> bytes:
        """Sign bytes: 64 bytes of Ed25519 signature."""
        return self._private.sign(data)


@dataclass(frozen=True, slots=True)
class HostVerifier:
    """The public half of a host key, as its peer id holds it."""

    peer_id: PeerId

    @property
    def key_id(self) -> str:
        """The peer id."""
        return self.peer_id

    def verify(self, signature: bytes, data: bytes) -> None:
        """Return when the peer signed `data`; raises VerificationFailed when not."""
        try:
            public = ed25519.Ed25519PublicKey.from_public_bytes(public_of_peer_id(self.peer_id))
            public.verify(signature, data)
        except (InvalidSignature, ValueError) as error:
            raise VerificationFailed(f"not signed by peer {self.peer_id}") from error


def host_verifier(peer_id: PeerId) -> HostVerifier:
    """The verifier of one peer's signatures; raises ValueError when the id holds no Ed25519 key."""
    public_of_peer_id(peer_id)
    return HostVerifier(peer_id)


@dataclass(frozen=True, slots=True)
class PublicPublisherKey:
    """A P-256 public key: the name of a publisher."""

    _public: ec.EllipticCurvePublicKey

    @classmethod
    def from_pem(cls, pem: bytes | str) -> PublicPublisherKey:
        """Read a SubjectPublicKeyInfo in PEM; raises ValueError on anything but P-256."""
        data = pem.encode() if isinstance(pem, str) else pem
        if len(data) > MAX_PEM:
            raise ValueError(f"a public key of {len(data)} bytes")
        try:
            key = serialization.load_pem_public_key(data)
        except UnsupportedAlgorithm as error:
            raise ValueError("the publisher key is of an unknown kind") from error
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError("the publisher key is not a P-256 key")
        return cls(key)

    @property
    def public_pem(self) -> str:
        """The key in PEM, as openssl writes it."""
        return self._public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ).decode()

    @property
    def key_id(self) -> Digest:
        """`sha256:` and the hex digest of the SubjectPublicKeyInfo in DER."""
        return sha256(
            self._public.public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )

    def verify(self, signature: bytes, data: bytes) -> None:
        """Return when the publisher signed `data`; raises VerificationFailed when not."""
        try:
            self._public.verify(signature, data, ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, ValueError) as error:
            raise VerificationFailed(f"not signed by publisher {self.key_id}") from error


@dataclass(frozen=True, slots=True)
class PublisherKey:
    """A P-256 private key: whoever signs models."""

    _private: ec.EllipticCurvePrivateKey

    @classmethod
    def generate(cls) -> PublisherKey:
        """Draw a new key from the operating system."""
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def from_pem(cls, pem: bytes) -> PublisherKey:
        """Read unencrypted PKCS#8; raises ValueError on anything but P-256."""
        key = _load_private(pem)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError("the publisher key is not a P-256 key")
        return cls(key)

    @property
    def private_pem(self) -> bytes:
        """The private key as unencrypted PKCS#8."""
        return _private_pem(self._private)

    @property
    def public(self) -> PublicPublisherKey:
        """The public half."""
        return PublicPublisherKey(self._private.public_key())

    @property
    def public_pem(self) -> str:
        """The public half in PEM."""
        return self.public.public_pem

    @property
    def key_id(self) -> Digest:
        """The name of the public half."""
        return self.public.key_id

    def sign(self, data: bytes) -> bytes:
        """Sign bytes: ECDSA over SHA-256, in DER."""
        return self._private.sign(data, ec.ECDSA(hashes.SHA256()))


def peer_id_of_public(raw: bytes) -> PeerId:
    """The peer id of 32 raw Ed25519 public bytes."""
    return PeerId(_base58(_IDENTITY_MULTIHASH + libp2p_public_key(raw)))


def public_of_peer_id(peer_id: PeerId) -> bytes:
    """The 32 raw Ed25519 public bytes inside a peer id; raises ValueError when it holds none."""
    number = 0
    for letter in peer_id:
        number = number * 58 + _BASE58.index(letter)
    data = number.to_bytes(_PEER_ID_SIZE, "big") if number.bit_length() <= 8 * _PEER_ID_SIZE else b""
    prefix = _IDENTITY_MULTIHASH + _PROTOBUF_ED25519
    if not data.startswith(prefix):
        raise ValueError(f"no Ed25519 key in peer id {peer_id}")
    return data[len(prefix) :]


def libp2p_public_key(raw: bytes) -> bytes:
    """The libp2p protobuf encoding of 32 raw Ed25519 public bytes; raises ValueError on another length."""
    if len(raw) != 32:
        raise ValueError(f"an Ed25519 public key of {len(raw)} bytes")
    return _PROTOBUF_ED25519 + raw


def _base58(data: bytes) -> str:
    number, letters = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        letters = _BASE58[digit] + letters
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + letters


def _load_private(pem: bytes) -> object:
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except (TypeError, UnsupportedAlgorithm) as error:
        raise ValueError("the private key is encrypted or of an unknown kind") from error


def _private_pem(key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
