"""Proven: a signed statement with the record of whoever signed it, as one line that proves itself.

{"version": 1, "envelope": {DSSE}, ROLE: {publisher record}}     ROLE says what the signer is: "auditor", …
"""

from __future__ import annotations

from dataclasses import dataclass

from merge_core.digest import canonical, check_version, parse_canonical
from node.domain import text
from node.errors import VerificationFailed
from node.identity.binding import Binding
from node.identity.envelopes import Envelope, open_envelope, seal
from node.identity.keyring import Identity

MAX_LINE = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Proven:
    """A payload and who signed it; one that was read is verified."""

    payload: bytes
    signer: Binding
    envelope: Envelope

    @classmethod
    def sign(cls, payload_type: str, payload: bytes, identity: Identity) -> Proven:
        """Let a node sign a payload."""
        envelope = seal(payload_type, payload, identity.publisher)
        return cls(payload=payload, signer=identity.binding, envelope=envelope)

    @classmethod
    def parse(cls, data: bytes, payload_type: str, role: str) -> Proven:
        """Read a line that may come from anybody, signatures verified; raises VerificationFailed."""
        if len(data) > MAX_LINE:
            raise VerificationFailed(f"a line of {len(data)} bytes; at most {MAX_LINE} are read")
        try:
            value = text.fields(parse_canonical(data), {"version", "envelope", role})
            check_version(value["version"], 1, "line")
            signer = Binding.parse(canonical(value[role]))
        except (ValueError, TypeError, RecursionError) as error:
            raise VerificationFailed(f"not signed as a line: {error}") from error
        envelope = Envelope.from_json(value["envelope"])
        payload = open_envelope(envelope, payload_type, signer.publisher)
        return cls(payload=payload, signer=signer, envelope=envelope)

    def to_bytes(self, role: str) -> bytes:
        """The line, without its end."""
        record = parse_canonical(self.signer.to_bytes())
        return canonical({"version": 1, "envelope": self.envelope.to_json(), role: record})
