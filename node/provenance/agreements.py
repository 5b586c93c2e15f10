"""`weft.agreements.json`: the signed negotiation of a merge, as it lies beside the result.

A list of Agreements in their envelopes, each signed by both parties, sorted by digest. It proves that the
holders of the parents gave them for this plan; its digest is in the provenance.
`parse(pack(envelopes))` gives the Agreements.
"""

from __future__ import annotations

from collections.abc import Iterable

from merge_core.digest import canonical, check_version, parse_canonical
from node.domain import text
from node.domain.negotiation import AGREEMENT_TYPE, Agreement
from node.errors import VerificationFailed
from node.identity.envelopes import Envelope, open_envelope
from node.identity.keys import host_verifier

MAX_AGREEMENTS = 1024
MAX_FILE = 64 << 20


def pack(envelopes: Iterable[Envelope]) -> bytes:
    """The content of weft.agreements.json; raises VerificationFailed unless both parties signed each."""
    signed = {open_agreement(envelope).digest: envelope for envelope in envelopes}
    return canonical({"version": 1, "agreements": [signed[digest].to_json() for digest in sorted(signed)]})


def parse(data: bytes) -> tuple[Agreement, ...]:
    """Read a file that may come from anybody, every signature verified; raises VerificationFailed."""
    if len(data) > MAX_FILE:
        raise VerificationFailed(f"{len(data)} bytes of agreements; at most {MAX_FILE} are read")
    try:
        value = text.fields(parse_canonical(data), {"version", "agreements"})
        check_version(value["version"], 1, "agreements")
        envelopes = text.items(value["agreements"], MAX_AGREEMENTS, "agreements", Envelope.from_json)
        agreements = tuple(open_agreement(envelope) for envelope in envelopes)
        text.ascending([agreement.digest for agreement in agreements], "agreements")
    except (ValueError, TypeError, RecursionError) as error:
        raise VerificationFailed(f"not a list of agreements: {error}") from error
    return agreements


def open_agreement(envelope: Envelope) -> Agreement:
    """The Agreement that both its parties signed; raises VerificationFailed."""
    try:
        agreement = Agreement.parse(envelope.payload)
        parties = (host_verifier(agreement.provider), host_verifier(agreement.requester))
    except ValueError as error:
        raise VerificationFailed(f"not an agreement: {error}") from error
    open_envelope(envelope, AGREEMENT_TYPE, *parties)
    return agreement
