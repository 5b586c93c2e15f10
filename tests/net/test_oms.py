"""model.sig: what it covers, what it refuses, and that the stock tool of model_signing 1.1.1 agrees."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.checkpoint.published import PUBLISHER_FILE
from merge_core.digest import Digest, sha256
from merge_core.errors import CorruptCheckpoint
from node.errors import LocalError, VerificationFailed
from node.identity.binding import bind
from node.identity.envelopes import pae
from node.identity.keys import HostKey, PublicPublisherKey, PublisherKey
from node.provenance import oms

KEY = PublisherKey.generate()
STOCK = Path(__file__).parents[2] / ".cache" / "model-signing"
IN_TOTO = "application/vnd.in-toto+json"


@pytest.fixture
def signed(model_dir: Path) -> Path:
    """The tiny checkpoint with our own records, all signed."""
    (model_dir / PUBLISHER_FILE).write_bytes(bind(HostKey.generate(), KEY, now=1.8e9).to_bytes())
    (model_dir / "weft.manifest.json").write_text("{}")
    (model_dir / "provenance.dsse.json").write_text("{}")
    oms.sign_directory(model_dir, KEY)
    return model_dir


def flip(path: Path, at: int = -1) -> None:
    """Flip one bit of the byte at `at`."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def refused(directory: Path, key: PublisherKey = KEY, match: str | None = None) -> None:
    """Assert that verification fails with a reason."""
    with pytest.raises(VerificationFailed, match=match):
        oms.verify_directory(directory, key.public)


def test_every_file_but_the_signature_is_signed(signed: Path) -> None:
    files = oms.verify_directory(signed, KEY.public).files
    assert set(files) == {p.name for p in signed.iterdir()} - {"model.sig"}
    assert files["LICENSE"] == sha256((signed / "LICENSE").read_bytes())
    assert {PUBLISHER_FILE, "weft.manifest.json", "provenance.dsse.json", "README.md"} <= set(files)


def test_one_flipped_bit_in_any_signed_file_is_refused(signed: Path) -> None:
    for name in oms.verify_directory(signed, KEY.public).files:
        original = (signed / name).read_bytes()
        for at in (0, len(original) // 2, -1):
            flip(signed / name, at)
            refused(signed, match=f"not as signed: {name}")
            (signed / name).write_bytes(original)
    oms.verify_directory(signed, KEY.public)


def test_no_bit_of_the_signature_file_can_be_flipped(signed: Path) -> None:
    data = (signed / "model.sig").read_bytes()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        with pytest.raises(VerificationFailed):
            oms.parse_bundle(bytes(changed)).open(KEY.public)


def test_another_key_did_not_sign_it(signed: Path) -> None:
    refused(signed, PublisherKey.generate(), match="another publisher key")
    bundle = json.loads((signed / "model.sig").read_bytes())
    bundle["verificationMaterial"]["publicKey"]["hint"] = ""
    (signed / "model.sig").write_text(json.dumps(bundle))
    refused(signed, PublisherKey.generate(), match="not signed by publisher")


def link(directory: Path) -> None:
    (directory / "README.md").rename(directory.parent / "card")
    (directory / "README.md").symlink_to(directory.parent / "card")


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda d: (d / "README.md").unlink(), "signed but missing: README.md"),
        (lambda d: (d / "NOTICE").write_text("new"), "not signed: NOTICE"),
        (lambda d: (d / "evil.py").write_text("x"), "not of a published model: evil.py"),
        (lambda d: (d / ".gitignore").write_text("x"), "not of a published model: .gitignore"),
        (lambda d: (d / "extra").mkdir(), "not of a published model: extra"),
        (lambda d: (d / "other.safetensors").write_bytes(b"x"), "not of a published model: other"),
        (lambda d: os.mkfifo(d / "pipe"), "not of a published model: pipe"),
        (lambda d: (d / "readme.MD").write_text("x"), "readme.MD"),
        (lambda d: (d / "model.sig").unlink(), "is not signed"),
        (lambda d: (d / "model.sig").write_bytes(b"x" * (5 << 20)), "more than"),
        (link, "symlinks"),
    ],
)
def test_what_the_directory_holds_must_be_what_was_signed(
    signed: Path, harm: Callable[[Path], Any], why: str
) -> None:
    harm(signed)
    refused(signed, match=why)


def test_a_link_to_the_directory_is_refused(signed: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(signed)
    refused(tmp_path / "alias", match="symlink")


def test_signing_again_replaces_the_signature_and_leaves_nothing_else(signed: Path) -> None:
    before = {p.name for p in signed.iterdir()}
    os.link(signed / "model.sig", signed.parent / "elsewhere")
    old = (signed / "model.sig").read_bytes()
    newer = PublisherKey.generate()
    oms.sign_directory(signed, newer)
    oms.verify_directory(signed, newer.public)
    assert {p.name for p in signed.iterdir()} == before
    assert (signed.parent / "elsewhere").read_bytes() == old


def test_digests_that_are_known_are_not_computed_again(model_dir: Path) -> None:
    claimed = Digest("sha256:" + "5" * 64)
    hashed: list[int] = []
    oms.sign_directory(model_dir, KEY, {"model.safetensors": claimed}, on_progress=hashed.append)
    assert (
        oms.parse_bundle((model_dir / "model.sig").read_bytes()).open(KEY.public).files["model.safetensors"]
        == claimed
    )
    assert sum(hashed) == sum(
        p.stat().st_size for p in model_dir.iterdir() if p.suffix not in (".safetensors", ".sig")
    )
    refused(model_dir, match="not as signed: model.safetensors")


def test_what_is_not_published_is_not_signed(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "run.py").write_text("x")
    with pytest.raises(LocalError, match=r"run\.py"):
        oms.sign_directory(model_dir, KEY)
    with pytest.raises(CorruptCheckpoint):
        oms.sign_directory(tmp_path / "nothing", KEY)
    assert not (model_dir / "model.sig").exists()


def forged(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """A bundle whose statement was changed and then signed, with its root digest put right."""
    files = {n: sha256(n.encode()) for n in ("LICENSE", "README.md", "config.json")}
    bundle = json.loads(oms.make_bundle(files, KEY))
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement)
    digests = [bytes.fromhex(r["digest"]) for r in statement["predicate"]["resources"]]
    statement["subject"][0].setdefault("digest", {"sha256": hashlib.sha256(b"".join(digests)).hexdigest()})
    payload = json.dumps(statement).encode()
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    signature = base64.b64encode(KEY.sign(pae(IN_TOTO, payload))).decode()
    bundle["dsseEnvelope"]["signatures"] = [{"sig": signature, "keyid": ""}]
    return json.dumps(bundle).encode()


def test_the_forger_of_these_tests_can_also_tell_the_truth() -> None:
    assert set(oms.parse_bundle(forged(lambda s: s)).open(KEY.public).files) == {
        "LICENSE",
        "README.md",
        "config.json",
    }


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(statement: dict[str, Any]) -> None:
        resources = statement["predicate"]["resources"]
        next(r for r in resources if r["name"] == old)["name"] = new
        resources.sort(key=lambda r: r["name"])
        del statement["subject"][0]["digest"]

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["predicate"]["serialization"].update(ignore_paths=["model.sig", "run.py"]),
        lambda s: s["predicate"]["serialization"].update(ignore_paths=["."]),
        lambda s: s["predicate"]["serialization"].update(ignore_paths=[["model.sig"]]),
        lambda s: s["predicate"]["serialization"].update(allow_symlinks=True),
        lambda s: s["predicate"]["serialization"].update(method="shards"),
        lambda s: s["predicate"]["serialization"].update(hash_type="blake2b"),
        lambda s: s["predicate"].update(more=1),
        lambda s: s["predicate"].update(resources=[]),
        lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0]),
        lambda s: s["predicate"]["resources"].reverse(),
        lambda s: s["subject"][0]["digest"].update(sha256="0" * 64),
        lambda s: s["subject"].append(s["subject"][0]),
        lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"),
        lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"),
        rename("README.md", "../README.md"),
        rename("README.md", "a/README.md"),
        rename("README.md", "/etc/passwd"),
        rename("README.md", ".hidden"),
        rename("README.md", "model.sig"),
        rename("README.md", "license"),
        rename("README.md", "cafe\u0301.md"),
        rename("README.md", "con.md"),
        rename("README.md", ""),
    ],
)
def test_a_well_signed_statement_that_says_odd_things_is_refused(change: Callable[[Any], Any]) -> None:
    with pytest.raises(VerificationFailed, match="signs no model"):
        oms.parse_bundle(forged(change)).open(KEY.public)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.update(mediaType="application/vnd.dev.sigstore.bundle.v0.2+json"),
        lambda b: b.update(more=1),
        lambda b: b["verificationMaterial"].update(tlogEntries=[{}]),
        lambda b: b["verificationMaterial"].update(certificate={}),
        lambda b: b["verificationMaterial"].update(publicKey={"hint": 7}),
        lambda b: b["dsseEnvelope"]["signatures"].append({"sig": "AAAA", "keyid": "x"}),
        lambda b: b["dsseEnvelope"].update(signatures=[]),
        lambda b: b["dsseEnvelope"].update(payloadType="text/plain"),
    ],
)
def test_a_bundle_of_another_shape_is_refused(change: Callable[[Any], Any]) -> None:
    bundle = json.loads(oms.make_bundle({"a.md": sha256(b"")}, KEY))
    change(bundle)
    with pytest.raises(VerificationFailed, match="no Model Signing bundle"):
        oms.parse_bundle(json.dumps(bundle).encode())


@given(
    data=st.binary(max_size=200) | st.sampled_from([b"[" * 100_000, b'{"mediaType":1,"mediaType":1}', b"NaN"])
)
def test_rubbish_is_no_bundle(data: bytes) -> None:
    with pytest.raises(VerificationFailed):
        oms.parse_bundle(data)


@given(
    files=st.dictionaries(st.from_regex(r"[a-z]{1,8}\.md", fullmatch=True), st.binary(max_size=9), min_size=1)
)
@settings(max_examples=30)
def test_what_is_signed_is_what_is_read(files: dict[str, bytes]) -> None:
    names = {n: d for n, d in files.items() if not n.startswith(("con.", "aux.", "nul.", "prn."))} or {
        "a.md": b""
    }
    digests = {name: sha256(data) for name, data in names.items()}
    opened = oms.parse_bundle(oms.make_bundle(digests, KEY)).open(KEY.public)
    assert dict(opened.files) == digests
    assert opened.publisher == KEY.key_id


@pytest.fixture(scope="module")
def stock() -> Path:
    """The command line of model_signing 1.1.1, in an environment of its own."""
    command = STOCK / "bin" / "model_signing"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", STOCK], check=True)
        # pyOpenSSL is an undeclared dependency of it.
        wanted = ["model_signing==1.1.1", "pyOpenSSL==26.4.0"]
        subprocess.run([STOCK / "bin" / "pip", "install", "--quiet", *wanted], check=True)
    return command


def accepts(stock: Path, directory: Path, key: PublisherKey = KEY) -> bool:
    """Whether the stock tool verifies `directory`."""
    pem = directory.parent / "pub.pem"
    pem.write_text(key.public_pem)
    arguments = ["verify", "key", directory, "--signature", directory / "model.sig", "--public_key", pem]
    done = subprocess.run([stock, *arguments], capture_output=True, text=True, check=False)
    assert ("Verification succeeded" in done.stdout) == (done.returncode == 0), done
    return done.returncode == 0


@pytest.mark.foreign
@pytest.mark.timeout(600)
def test_the_stock_tool_accepts_our_signature_and_both_refuse_one_flipped_bit(
    stock: Path, signed: Path
) -> None:
    assert accepts(stock, signed)
    for name in oms.verify_directory(signed, KEY.public).files:
        original = (signed / name).read_bytes()
        flip(signed / name, len(original) // 2)
        assert not accepts(stock, signed), name
        refused(signed, match=name)
        (signed / name).write_bytes(original)
    assert accepts(stock, signed)
    (signed / "NOTICE").write_text("unsigned")
    assert not accepts(stock, signed)


@pytest.mark.foreign
@pytest.mark.timeout(600)
def test_we_accept_what_the_stock_tool_signed(stock: Path, model_dir: Path) -> None:
    key = model_dir.parent / "key.pem"
    key.write_bytes(KEY.private_pem)
    arguments = ["sign", "key", model_dir, "--signature", model_dir / "model.sig", "--private_key", key]
    subprocess.run([stock, *arguments], check=True)
    assert "README.md" in oms.verify_directory(model_dir, KEY.public).files
    flip(model_dir / "README.md")
    refused(model_dir, match=r"README\.md")


@pytest.mark.foreign
@pytest.mark.timeout(600)
def test_the_stock_tool_accepts_added_and_merged_models(stock: Path, family) -> None:
    for directory, who in ((family.parents["math"], family.owner), (family.merged, family.builder)):
        assert accepts(stock, directory, who.publisher)
        for name in oms.verify_directory(directory, who.publisher.public).files:
            original = (directory / name).read_bytes()
            flip(directory / name, len(original) // 2)
            assert not accepts(stock, directory, who.publisher), name
            refused(directory, who.publisher)
            (directory / name).write_bytes(original)


RECIPE = """
merge_method: ties
base_model: ./base
models:
  - {model: ./math, parameters: {weight: 1.0, density: 0.4}}
  - {model: ./code, parameters: {weight: 0.5, density: 0.6}}
"""


@pytest.mark.foreign
@pytest.mark.timeout(600)
def test_the_stock_tool_and_weft_verify_agree_on_what_the_real_command_made(
    stock: Path, family, tmp_path: Path
) -> None:
    folder = family.merged.parent
    environment = {**os.environ, "WEFT_HOME": str(tmp_path / "home")}

    def weft(*words: str | Path, code: int = 0) -> Any:
        command = [Path(sys.executable).with_name("weft"), "--json", *words]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done
        return json.loads(done.stdout).get("data")

    weft("init")
    (folder / "recipe.yml").write_text(RECIPE)
    for directory in family.parents.values():
        (directory / "model.sig").unlink()  # signed by others: the node signs what it adds
    added = Path(weft("add", "math")["directory"])
    merged = Path(weft("merge", "recipe.yml", "-o", "out")["directory"])
    pem = tmp_path / "publisher.pem"
    pem.write_text(weft("id", "show")["publisher_key"])
    key = PublicPublisherKey.from_pem(pem.read_bytes())
    verify = ["--signature", "model.sig", "--public_key", pem, "."]

    def accepted(directory: Path) -> bool:
        done = subprocess.run(
            [stock, "verify", "key", *verify], cwd=directory, capture_output=True, check=False
        )
        return done.returncode == 0

    for directory in (added, merged):
        files = oms.verify_directory(directory, key).files
        assert {"model.safetensors", "README.md", "weft.publisher.json"} <= files.keys()
        assert accepted(directory)
        weft("verify", directory, "--publisher", pem)
        for name in files:
            original = (directory / name).read_bytes()
            flip(directory / name, len(original) // 2)
            assert not accepted(directory), name
            weft("verify", directory, "--publisher", pem, code=5)
            (directory / name).write_bytes(original)
        assert accepted(directory)
