"""TLS certificates that prove a peer id: self-signed P-256 with the libp2p extension.

The extension (OID 1.3.6.1.4.1.53594.1.1) holds the host's public key and its signature over the
certificate's own public key: https://github.com/libp2p/specs/blob/master/tls/tls.md. It is non-critical and
every certificate carries the same DNS name, since grpc verifies chains and names by itself and knows no
callback; the subject is unique, because a set of roots is searched by subject.
"""

from __future__ import annotations

import secrets
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


def make_certificate(host: HostKey, now: float, *, lifetime: int = LIFETIME) -> TlsCertificate:
    """Draw a TLS key and have the host key vouch for it; valid for `lifetime` seconds from `now`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, host.peer_id),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, secrets.token_hex(16)),
        ]
    )
    signature = host.sign(_PREFIX + _spki(key.public_key()))
    public = libp2p_public_key(public_of_peer_id(host.peer_id))
    signed_key = _BEFORE_KEY + public + _BEFORE_SIGNATURE + signature
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(int(now) - CLOCK_SKEW, UTC))
        .not_valid_after(datetime.fromtimestamp(int(now) + lifetime, UTC))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(TARGET_NAME)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.UnrecognizedExtension(_EXTENSION, signed_key), critical=False)
        .sign(key, hashes.SHA256())
    )
    return TlsCertificate(
        pem=certificate.public_bytes(serialization.Encoding.PEM),
        key_pem=key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )


def peer_id_of(pem: bytes, now: float) -> PeerId:
    """The peer that a certificate proves to belong to; raises PeerError on whatever is not exact."""
    if len(pem) > MAX_CERTIFICATE:
        raise PeerError(f"a certificate of {len(pem)} bytes; at most {MAX_CERTIFICATE} are read")
    try:
        certificate = _only_certificate(pem)
        key = certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError("its key is not a P-256 key")
        certificate.verify_directly_issued_by(certificate)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if list(names) != [x509.DNSName(TARGET_NAME)]:
            raise ValueError("it carries other names than every peer's")
        extension = certificate.extensions.get_extension_for_oid(_EXTENSION).value
        peer_id, signature = _signed_key(extension.public_bytes())
        host_verifier(peer_id).verify(signature, _PREFIX + _spki(key))
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise PeerError(f"not a peer's certificate: {error or type(error).__name__}") from error
    except (*_MALFORMED, VerificationFailed) as error:
        raise PeerError(f"a certificate that proves no peer id: {error}") from error
    moment = datetime.fromtimestamp(now, UTC)
    if not certificate.not_valid_before_utc <= moment <= certificate.not_valid_after_utc:
        raise PeerError(f"the certificate of {peer_id} is not valid at this time; compare both clocks")
    return peer_id


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
