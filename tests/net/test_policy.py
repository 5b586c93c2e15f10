"""The policy file: what is left out keeps its default, what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.domain.negotiation import Purpose
from node.errors import LocalError
from node.identity.keys import HostKey
from node.negotiation import policy

PEER = HostKey.from_private_bytes(bytes(range(32))).peer_id


def test_the_default_gives_free_licences_to_anybody() -> None:
    rules = policy.default()
    assert rules.serves(PEER)
    assert rules.grants("Apache-2.0") and rules.grants("mit")
    assert rules.grants("GPL-3.0-only OR MIT")
    assert not rules.grants("CC-BY-NC-4.0") and not rules.grants("NOASSERTION")
    assert rules.purposes_of("MIT") == (Purpose.AUDIT, Purpose.MERGE, Purpose.MIRROR)
    assert rules.purposes_of("LicenseRef-house") == ()


def test_no_file_and_an_empty_file_mean_the_default(tmp_path: Path) -> None:
    assert policy.load(tmp_path / "policy.toml") == policy.default()
    (tmp_path / "policy.toml").write_text("")
    assert policy.load(tmp_path / "policy.toml") == policy.default()


def test_a_setting_replaces_its_default_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(f'[who]\ndeny = ["{PEER}"]\n[what]\npurposes = ["audit"]\nlicences = ["*"]\n')
    rules = policy.load(path)
    assert not rules.serves(PEER) and rules.grants("NOASSERTION")
    assert rules.purposes_of("whatever") == (Purpose.AUDIT,)
    assert rules.bytes_per_peer_per_day == policy.default().bytes_per_peer_per_day


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[who", "cannot be read"),
        ("[whom]\nallow = []", "whom"),
        ("who = 3", "who"),
        ("[what]\ncolour = 3", "what.colour"),
        ('[what]\nlicences = "MIT"', "what.licences"),
        ('[what]\npurposes = ["theft"]', "theft"),
        ('[who]\nallow = ["bob"]', "bob"),
        ("[limits]\nbytes_per_peer_per_day = -1", "limits.bytes_per_peer_per_day"),
        ("[limits]\nbytes_per_peer_per_day = true", "limits.bytes_per_peer_per_day"),
        ("[limits]\nagreement_seconds = 0", "limits.agreement_seconds"),
        ("[limits]\nagreement_seconds = 9999999", "limits.agreement_seconds"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(LocalError, match=named) as error:
        policy.load(path)
    assert str(path) in error.value.why and error.value.hint
