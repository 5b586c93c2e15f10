"""TLS certificates that prove a peer id: self-signed P-256 with the libp2p extension.

The extension (OID 1.3.6.1.4.1.53594.1.1) holds the host's public key and its signature over the
certificate's own public key: https://github.com/libp2p/specs/blob/master/tls/tls.md. It is non-critical and
every certificate carries the same DNS name, since grpc verifies chains and names by itself and knows no
callback. A set of roots is searched by subject, and one that does not load takes others with it: so the
subject follows from the peer id and the key, and a certificate is accepted only if it is, byte for byte but
for its signature, what `make_certificate` writes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from node.domain.ids import PeerId
from node.errors import PeerError, VerificationFailed
from node.identity.keys import HostKey, host_verifier, libp2p_public_key, peer_id_of_public, public_of_peer_id

TARGET_NAME = "peer.weft.invalid"
"""The one DNS name of every certificate: what a client passes as grpc.ssl_target_name_override."""
LIFETIME = 365 * 24 * 3600
CLOCK_SKEW = 3600
MAX_CERTIFICATE = 16 << 10

_EXTENSION = x509.ObjectIdentifier("1.3.6.1.4.1.53594.1.1")
_PREFIX = b"libp2p-tls-handshake:"
# Not one of these is a ValueError.
_MALFORMED = (
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
# SEQUENCE { OCTET STRING of 36 bytes, OCTET STRING of 64 bytes }: with Ed25519 the lengths are fixed.
_BEFORE_KEY, _BEFORE_SIGNATURE, _SIGNED_KEY_SIZE = b"\x30\x68\x04\x24", b"\x04\x40", 106


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsCertificate:
    """A certificate and its private key, both PEM."""

    pem: bytes
    key_pem: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCertificate:
    """A peer's certificate that was checked: PEM in our own spelling, whatever its sender's was."""

    peer: PeerId
    pem: bytes


def make_certificate(host: HostKey, now: float, *, lifetime: int = LIFETIME) -> TlsCertificate:
    """Draw a TLS key and have the host key vouch for it; valid for `lifetime` seconds from `now`."""
    key = ec.generate_private_key(ec.SECP256R1())
    signature = host.sign(_PREFIX + _spki(key.public_key()))
    unsigned = (
        _unsigned(host.peer_id, key.public_key(), signature)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(int(now) - CLOCK_SKEW, UTC))
        .not_valid_after(datetime.fromtimestamp(int(now) + lifetime, UTC))
    )
    return TlsCertificate(
        pem=unsigned.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
        key_pem=key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )


def read_certificate(pem: bytes, now: float) -> PeerCertificate:
    """Check a certificate that may come from anybody; raises PeerError on whatever is not exact."""
    if len(pem) > MAX_CERTIFICATE:
        raise PeerError(f"a certificate of {len(pem)} bytes; at most {MAX_CERTIFICATE} are read")
    try:
        certificate = _only_certificate(pem)
        key = certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError("its key is not a P-256 key")
        certificate.verify_directly_issued_by(certificate)
        extension = certificate.extensions.get_extension_for_oid(_EXTENSION).value
        peer_id, signature = _signed_key(extension.public_bytes())
        host_verifier(peer_id).verify(signature, _PREFIX + _spki(key))
        if certificate.tbs_certificate_bytes != _as_made(certificate, key, peer_id, signature):
            raise ValueError("its subject, names, extensions or encoding are not those of a peer's")
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise PeerError(f"not a peer's certificate: {error or type(error).__name__}") from error
    except (*_MALFORMED, VerificationFailed) as error:
        raise PeerError(f"a certificate that proves no peer id: {error}") from error
    moment = datetime.fromtimestamp(now, UTC)
    if not certificate.not_valid_before_utc <= moment <= certificate.not_valid_after_utc:
        raise PeerError(f"the certificate of {peer_id} is not valid at this time; compare both clocks")
    return PeerCertificate(peer=peer_id, pem=certificate.public_bytes(serialization.Encoding.PEM))


def _unsigned(peer_id: PeerId, key: ec.EllipticCurvePublicKey, signature: bytes) -> x509.CertificateBuilder:
    """All of a peer's certificate that follows from who it is: neither serial number nor dates."""
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, peer_id),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, hashlib.sha256(_spki(key)).hexdigest()),
        ]
    )
    signed_key = _BEFORE_KEY + libp2p_public_key(public_of_peer_id(peer_id)) + _BEFORE_SIGNATURE + signature
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(TARGET_NAME)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.UnrecognizedExtension(_EXTENSION, signed_key), critical=False)
    )


def _as_made(
    certificate: x509.Certificate, key: ec.EllipticCurvePublicKey, peer_id: PeerId, signature: bytes
) -> bytes:
    """What a peer's certificate with this serial number and these dates has to say; raises ValueError."""
    return (
        _unsigned(peer_id, key, signature)
        .serial_number(certificate.serial_number)
        .not_valid_before(certificate.not_valid_before_utc)
        .not_valid_after(certificate.not_valid_after_utc)
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())  # any key: only what it signs counts
        .tbs_certificate_bytes
    )


def _only_certificate(pem: bytes) -> x509.Certificate:
    certificates = x509.load_pem_x509_certificates(pem)
    if len(certificates) != 1:
        raise ValueError(f"{len(certificates)} certificates where one belongs")
    der = certificates[0].public_bytes(serialization.Encoding.DER)
    if not der.endswith(b"\0" + certificates[0].signature):
        raise ValueError("its signature is not a whole number of bytes")  # the library lets it pass
    return certificates[0]


def _signed_key(der: bytes) -> tuple[PeerId, bytes]:
    key, rest = der[4:40], der[40:]
    exact = (
        len(der) == _SIGNED_KEY_SIZE and der.startswith(_BEFORE_KEY) and rest.startswith(_BEFORE_SIGNATURE)
    )
    if not exact or libp2p_public_key(key[4:]) != key:
        raise ValueError("its libp2p extension holds no Ed25519 key")
    return peer_id_of_public(key[4:]), rest[2:]


def _spki(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
