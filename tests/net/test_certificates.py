"""TLS certificates prove the peer id to us and to libp2p, serve both ends of TLS, and resist forgery."""

import ssl
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st
from libp2p.peer.id import ID
from libp2p.security.tls.certificate import verify_certificate_chain

from node.errors import PeerError
from node.identity.certificates import TARGET_NAME, make_certificate, read_certificate
from node.identity.keys import HostKey

NOW = datetime.now(UTC).timestamp()  # libp2p's verifier reads the clock by itself
HOST = HostKey.generate()
CERTIFICATE = make_certificate(HOST, NOW)
DER = x509.load_pem_x509_certificate(CERTIFICATE.pem).public_bytes(serialization.Encoding.DER)


def test_a_certificate_proves_its_peer() -> None:
    assert read_certificate(CERTIFICATE.pem, NOW).peer == HOST.peer_id


def test_libp2p_reads_the_same_peer_from_it() -> None:
    public = verify_certificate_chain([x509.load_pem_x509_certificate(CERTIFICATE.pem)])
    assert str(ID.from_pubkey(public)) == HOST.peer_id


def test_each_certificate_has_a_key_and_a_subject_of_its_own() -> None:
    other = make_certificate(HOST, NOW)
    subjects = {x509.load_pem_x509_certificate(c.pem).subject for c in (CERTIFICATE, other)}
    assert len(subjects) == 2
    assert all(x509.NameAttribute(NameOID.COMMON_NAME, HOST.peer_id) in subject for subject in subjects)
    assert other.key_pem != CERTIFICATE.key_pem
    assert "PRIVATE" not in repr(other)


@pytest.mark.parametrize("later", [-7200, 366 * 86400])
def test_a_certificate_out_of_its_time_is_refused(later: float) -> None:
    with pytest.raises(PeerError, match="not valid at this time"):
        read_certificate(CERTIFICATE.pem, NOW + later)


OWN = serialization.load_pem_private_key(CERTIFICATE.key_pem, None)
SUBJECT = x509.load_pem_x509_certificate(CERTIFICATE.pem).subject


def rebuilt(
    *,
    key: ec.EllipticCurvePrivateKey | None = None,
    subject: x509.Name = SUBJECT,
    issuer: x509.Name | None = None,
    san: str = TARGET_NAME,
    extension: bool = True,
    more: x509.ExtensionType | None = None,
) -> bytes:
    """HOST's certificate over again, for a new key where none is given, with something else in it."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    original = x509.load_pem_x509_certificate(CERTIFICATE.pem)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(original.not_valid_before_utc)
        .not_valid_after(original.not_valid_after_utc)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(san)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    )
    if extension:
        stolen = original.extensions.get_extension_for_oid(x509.ObjectIdentifier("1.3.6.1.4.1.53594.1.1"))
        builder = builder.add_extension(stolen.value, critical=False)
    if more:
        builder = builder.add_extension(more, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_a_stolen_extension_proves_nothing() -> None:
    with pytest.raises(PeerError, match="proves no peer id"):
        read_certificate(rebuilt(), NOW)


def test_a_certificate_without_the_extension_is_refused() -> None:
    with pytest.raises(PeerError, match="proves no peer id"):
        read_certificate(rebuilt(extension=False), NOW)


def test_nothing_but_the_serial_number_and_the_dates_is_free() -> None:
    assert isinstance(OWN, ec.EllipticCurvePrivateKey)
    assert read_certificate(rebuilt(key=OWN), NOW).peer == HOST.peer_id
    victim = x509.load_pem_x509_certificate(make_certificate(HostKey.generate(), NOW).pem).subject
    again = x509.load_pem_x509_certificate(make_certificate(HOST, NOW).pem).subject
    bare = x509.Name(list(SUBJECT)[:1])
    for wrong in (
        rebuilt(key=OWN, subject=victim),
        rebuilt(key=OWN, issuer=victim),
        rebuilt(key=OWN, subject=again),
        rebuilt(key=OWN, subject=bare),
        rebuilt(key=OWN, subject=x509.Name([*SUBJECT, *victim])),
        rebuilt(key=OWN, san="example.com"),
        rebuilt(key=OWN, more=x509.BasicConstraints(ca=False, path_length=None)),
    ):
        with pytest.raises(PeerError, match=r"certificate: (its subject|subject/issuer|Issuer)"):
            read_certificate(wrong, NOW)


def test_another_curve_is_refused() -> None:
    with pytest.raises(PeerError, match="P-256"):
        read_certificate(rebuilt(key=ec.generate_private_key(ec.SECP384R1())), NOW)


@pytest.mark.parametrize(
    "spelling",
    [
        CERTIFICATE.pem.strip(),
        CERTIFICATE.pem.replace(b"\n", b"\r\n"),
        b"words before it\n" + CERTIFICATE.pem + b"and after",
        CERTIFICATE.pem.replace(b"CERTIFICATE", b"X509 CERTIFICATE"),
    ],
)
def test_a_certificate_comes_out_in_one_spelling(spelling: bytes) -> None:
    assert spelling != CERTIFICATE.pem
    assert read_certificate(spelling, NOW).pem == CERTIFICATE.pem


def test_two_certificates_are_not_one() -> None:
    with pytest.raises(PeerError, match="2 certificates"):
        read_certificate(CERTIFICATE.pem * 2, NOW)
    with pytest.raises(PeerError, match="bytes"):
        read_certificate(CERTIFICATE.pem * 100, NOW)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_no_bit_of_a_certificate_can_be_flipped() -> None:
    for at in range(8 * len(DER)):
        data = bytearray(DER)
        data[at // 8] ^= 1 << at % 8
        with pytest.raises(PeerError):
            read_certificate(ssl.DER_cert_to_PEM_cert(bytes(data)).encode(), NOW)


@given(data=st.binary(max_size=300))
def test_rubbish_is_no_certificate(data: bytes) -> None:
    with pytest.raises(PeerError):
        read_certificate(data, NOW)


def test_openssl_shakes_hands_with_it_on_both_sides(tmp_path) -> None:
    other = make_certificate(HostKey.generate(), NOW)
    client, server = (
        context(tmp_path, "c", CERTIFICATE, other, False),
        context(tmp_path, "s", other, CERTIFICATE, True),
    )
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname=TARGET_NAME)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (ours, theirs):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    seen = theirs.getpeercert(binary_form=True)
    assert seen is not None
    assert read_certificate(ssl.DER_cert_to_PEM_cert(seen).encode(), NOW).peer == HOST.peer_id


def context(folder, name, own, root, serving):
    """A mutual-TLS context that trusts exactly one certificate."""
    (folder / f"{name}.pem").write_bytes(own.pem)
    (folder / f"{name}.key").write_bytes(own.key_pem)
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if serving else ssl.PROTOCOL_TLS_CLIENT)
    made.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    made.load_verify_locations(cadata=root.pem.decode())
    made.verify_mode = ssl.CERT_REQUIRED
    return made
