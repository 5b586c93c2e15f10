"""`model.sig`: an OpenSSF Model Signing v1.0 bundle, which tools that never heard of weft can check.

A Sigstore bundle (v0.3) with a public key hint holds a DSSE envelope with an in-toto statement that lists the
SHA-256 of every file. What we read is narrower than the specification, because its edges can hide things
(signed `ignore_paths`, paths outside the directory, names that the root digest does not bind):

- method `files`, SHA-256, no symlinks, exactly one signature, by a P-256 key that the caller names;
- `ignore_paths` name the signature itself, the file of evaluations and git's own files, nothing else;
- names are plain (flat, NFC, unique also without case), sorted, and of a kind that is published;
- the directory holds the files that are signed, `model.sig` and perhaps evaluations, whose lines carry
  signatures of their own: none missing, none more, no link, no folder.

https://github.com/ossf/model-signing-spec
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from merge_core.checkpoint import published
from merge_core.checkpoint.published import EVALUATIONS_FILE, SIGNATURE_FILE
from merge_core.checkpoint.reader import file_digest
from merge_core.digest import Digest
from merge_core.errors import CorruptCheckpoint
from merge_core.files import replace
from node.errors import LocalError, VerificationFailed
from node.identity.envelopes import Envelope, pae
from node.identity.keys import PublicPublisherKey, PublisherKey

MAX_BUNDLE = 4 << 20

_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_IGNORABLE = frozenset({SIGNATURE_FILE, EVALUATIONS_FILE, ".git", ".gitattributes", ".github", ".gitignore"})
_HINT = "weft verify DIR lists what is wrong; fetch the model again from another holder"


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedFiles:
    """What a publisher signed: the digest of every file of the directory, by name, sorted."""

    publisher: Digest
    files: Mapping[str, Digest]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle that was read but not believed: `open` verifies it."""

    hint: str
    payload: bytes
    signature: bytes

    def open(self, publisher: PublicPublisherKey) -> SignedFiles:
        """The signed files, once `publisher` signed them; raises VerificationFailed."""
        if self.hint and self.hint != key_hint(publisher):
            raise VerificationFailed("model.sig was made with another publisher key", hint=_HINT)
        publisher.verify(self.signature, pae(_PAYLOAD_TYPE, self.payload))
        try:
            files = _statement(_parse_json(self.payload))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, CorruptCheckpoint) as error:
            raise VerificationFailed(f"model.sig signs no model: {error}", hint=_HINT) from error
        return SignedFiles(publisher=publisher.key_id, files=files)


def parse_bundle(data: bytes) -> Bundle:
    """Read a bundle that may come from anybody; raises VerificationFailed."""
    try:
        if len(data) > MAX_BUNDLE:
            raise ValueError(f"{len(data)} bytes; at most {MAX_BUNDLE} are read")
        value = _parse_json(data)
        _keys(value, {"mediaType", "verificationMaterial", "dsseEnvelope"})
        if value["mediaType"] != _MEDIA_TYPE:
            raise ValueError("another media type")
        material = value["verificationMaterial"]
        _keys(material, {"publicKey"} if "tlogEntries" not in material else {"publicKey", "tlogEntries"})
        if material.get("tlogEntries", []) != []:
            raise ValueError("it refers to a transparency log")
        _keys(material["publicKey"], {"hint"})
        hint = material["publicKey"]["hint"]
        if not isinstance(hint, str) or len(hint) > 128:
            raise ValueError("its key hint is no text")
        envelope = Envelope.from_json(value["dsseEnvelope"])
        if envelope.payload_type != _PAYLOAD_TYPE or len(envelope.signatures) != 1:
            raise ValueError("its envelope is not one in-toto statement with one signature")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, VerificationFailed) as error:
        raise VerificationFailed(f"model.sig is no Model Signing bundle: {error}", hint=_HINT) from error
    (signature,) = envelope.signatures.values()
    return Bundle(hint=hint, payload=envelope.payload, signature=signature)


def make_bundle(files: Mapping[str, Digest], publisher: PublisherKey, *, name: str = "model") -> bytes:
    """The bundle in which `publisher` signs `files`; `name` is for the reader and binds nothing."""
    published.check_names(files)
    ordered = sorted(files)
    statement = {
        "_type": _STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": _root(files[n] for n in ordered)}}],
        "predicateType": _PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [SIGNATURE_FILE, EVALUATIONS_FILE],
            },
            "resources": [{"name": n, "algorithm": "sha256", "digest": files[n].hex} for n in ordered],
        },
    }
    payload = json.dumps(statement, ensure_ascii=False, separators=(",", ":")).encode()
    bundle = {
        "mediaType": _MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": key_hint(publisher.public)}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": _base64(payload),
            "payloadType": _PAYLOAD_TYPE,
            "signatures": [{"sig": _base64(publisher.sign(pae(_PAYLOAD_TYPE, payload))), "keyid": ""}],
        },
    }
    return json.dumps(bundle, separators=(",", ":")).encode()


def sign_directory(
    directory: Path,
    publisher: PublisherKey,
    digests: Mapping[str, Digest] | None = None,
    *,
    name: str = "model",
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write `model.sig` over every other file of a model directory, in place of one that lies there.

    `digests` spares the hashing of files whose SHA-256 the caller already has. Raises CorruptCheckpoint
    where there is no checkpoint, LocalError where something lies in it that is not published.
    """
    names = _signable(directory)
    known = digests or {}
    missing = [n for n in names if n not in known]
    files = {n: known[n] for n in names if n in known} | hash_files(directory, missing, on_progress)
    replace(directory / SIGNATURE_FILE, make_bundle(files, publisher, name=name))


def verify_directory(
    directory: Path,
    publisher: PublicPublisherKey,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> SignedFiles:
    """Hash every file and hold it against `model.sig`; raises VerificationFailed on any difference."""
    try:
        names = _signable(directory)
        bundle = parse_bundle(published.read_bounded(directory / SIGNATURE_FILE, MAX_BUNDLE))
    except FileNotFoundError as error:
        raise VerificationFailed(f"{directory} is not signed", hint="weft add DIR signs it") from error
    except (LocalError, CorruptCheckpoint) as error:
        raise VerificationFailed(error.why, hint=error.hint or _HINT) from error
    signed = bundle.open(publisher)
    _same_names(set(names), set(signed.files))
    found = hash_files(directory, names, on_progress)
    changed = [n for n in names if found[n] != signed.files[n]]
    if changed:
        raise VerificationFailed(f"not as signed: {_few(changed)}", hint=_HINT)
    return signed


def key_hint(publisher: PublicPublisherKey) -> str:
    """How a bundle hints at the key: the hex SHA-256 of its PEM."""
    return hashlib.sha256(publisher.public_pem.encode()).hexdigest()


def _signable(directory: Path) -> list[str]:
    """All file names but the signature, sorted; refuses what could hide in the directory."""
    if directory.is_symlink():
        raise LocalError(f"{directory} is a symlink", hint=f"weft verify {directory.resolve()}")
    survey = published.survey(directory)
    if survey.links:
        raise LocalError(f"symlinks cannot be signed: {_few(survey.links)}", hint="copy the files instead")
    if survey.strays:
        what = [f"{item.name} ({item.why})" for item in survey.strays]
        raise LocalError(f"not of a published model: {_few(what)}", hint="move it out of the directory")
    return sorted({*survey.published, *survey.records} - {SIGNATURE_FILE})


def _same_names(present: set[str], signed: set[str]) -> None:
    if present - signed:
        raise VerificationFailed(f"not signed: {_few(sorted(present - signed))}", hint=_HINT)
    if signed - present:
        raise VerificationFailed(f"signed but missing: {_few(sorted(signed - present))}", hint=_HINT)


def hash_files(
    directory: Path, names: list[str], on_progress: Callable[[int], None] | None
) -> dict[str, Digest]:
    """SHA-256 of files, two at a time; `on_progress` is called from those threads with bytes done."""

    def digest(name: str) -> Digest:
        return Digest("sha256:" + file_digest(directory / name, on_progress))

    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="sha256") as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _statement(value: Any) -> Mapping[str, Digest]:
    _keys(value, {"_type", "subject", "predicateType", "predicate"})
    if value["_type"] != _STATEMENT or value["predicateType"] != _PREDICATE:
        raise ValueError("another kind of statement")
    _serialization(value["predicate"])
    resources = value["predicate"]["resources"]
    if not isinstance(resources, list) or not 1 <= len(resources) <= published.MAX_FILES:
        raise ValueError(f"the number of its files is not between 1 and {published.MAX_FILES}")
    listed = [_resource(item) for item in resources]
    names = [name for name, _ in listed]
    if names != sorted(set(names)):
        raise ValueError("its files are not sorted, or one is repeated")
    published.check_names(names)
    files = dict(listed)
    (subject,) = value["subject"]
    _keys(subject, {"name", "digest"})
    if subject["digest"] != {"sha256": _root(files.values())}:
        raise ValueError("its root digest does not belong to its files")
    return MappingProxyType(files)


def _serialization(predicate: Any) -> None:
    _keys(predicate, {"serialization", "resources"})
    how = predicate["serialization"]
    ignored = how.get("ignore_paths", [])
    _keys(how | {"ignore_paths": ignored}, {"method", "hash_type", "allow_symlinks", "ignore_paths"})
    if how["method"] != "files" or how["hash_type"] != "sha256":
        raise ValueError("files must be hashed whole with SHA-256")
    if how["allow_symlinks"] is not False or not isinstance(ignored, list) or not set(ignored) <= _IGNORABLE:
        raise ValueError("it follows symlinks or ignores paths, which can hide files")


def _resource(item: Any) -> tuple[str, Digest]:
    _keys(item, {"name", "algorithm", "digest"})
    if item["algorithm"] != "sha256" or not isinstance(item["name"], str) or item["name"] == SIGNATURE_FILE:
        raise ValueError(f"file {str(item['name'])[:80]!r}")
    return item["name"], Digest("sha256:" + item["digest"])


def _root(digests: Any) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(digest.hex) for digest in digests)).hexdigest()


def _parse_json(data: bytes) -> Any:
    return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is repeated")
    return value


def _keys(value: Any, expected: set[str]) -> None:
    if not isinstance(value, dict) or set(value) != expected:
        raise ValueError(f"expected exactly the keys {sorted(expected)}")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _few(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
