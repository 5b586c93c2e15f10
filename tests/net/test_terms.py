"""Nobody widens the licence of somebody else's model by advertising it."""

from hypothesis import given
from hypothesis import strategies as st

from merge_core.digest import Digest, ModelId, sha256
from node.catalog.book import Listing
from node.domain.advert import AdvertisedModel
from node.domain.ids import PeerId
from node.domain.negotiation import Purpose
from node.identity.keys import HostKey
from node.merging.terms import by_publisher, licence_of, together

MODEL = ModelId(sha256(b"model"))
HONEST, MALLORY = sha256(b"honest key"), sha256(b"another key")
ALICE, BOB, EVE = (HostKey.from_private_bytes(bytes([n]) * 32).peer_id for n in (1, 2, 3))


def listing(peer: PeerId, licence: str, publisher: Digest = HONEST, name: str = "math") -> Listing:
    model = AdvertisedModel(
        model_id=MODEL,
        name=name,
        licence=licence,
        architecture="LlamaForCausalLM",
        base=None,
        size=1,
        fingerprint=sha256(b"fingerprint"),
        sketch=sha256(b"sketch"),
        publisher=publisher,
        purposes=(Purpose.MERGE,),
    )
    return Listing(peer=peer, model=model, seq=1, expires_at=2)


def test_the_publishers_own_peer_decides() -> None:
    (offered,) = by_publisher([listing(EVE, "MIT", name="!"), listing(ALICE, "CC-BY-NC-4.0")])
    assert licence_of(offered, publisher_peer=ALICE, card="MIT") == "CC-BY-NC-4.0"
    assert offered.named_by(ALICE) == "math"


def test_without_the_publisher_the_card_that_it_signed_decides() -> None:
    (offered,) = by_publisher([listing(EVE, "MIT")])
    assert licence_of(offered, publisher_peer=ALICE, card="CC-BY-NC-4.0") == "CC-BY-NC-4.0"


def test_holders_that_disagree_are_all_obeyed() -> None:
    (offered,) = by_publisher([listing(EVE, "MIT"), listing(BOB, "CC-BY-NC-4.0")])
    assert licence_of(offered, publisher_peer=None, card="NOASSERTION") == "CC-BY-NC-4.0 AND MIT"
    (silent,) = by_publisher([listing(EVE, "MIT"), listing(BOB, "NOASSERTION")])
    assert licence_of(silent, publisher_peer=None, card="NOASSERTION") == "NOASSERTION"


def test_a_publisher_that_nobody_has_is_a_group_of_its_own_and_comes_last() -> None:
    groups = by_publisher([listing(EVE, "MIT", MALLORY), listing(ALICE, "MIT"), listing(BOB, "MIT")])
    assert [group.publisher for group in groups] == [HONEST, MALLORY]
    assert [x.peer for x in groups[0].listings] == [ALICE, BOB]


@given(st.lists(st.sampled_from(["MIT", "Apache-2.0", "MIT OR GPL-3.0-only", "NOASSERTION"]), max_size=5))
def test_together_never_says_less_than_each(said: list[str]) -> None:
    whole = together(said)
    if not said or "NOASSERTION" in said:
        assert whole == "NOASSERTION"
    else:
        assert all(licence in whole for licence in said)
        assert together([whole, *said][:1]) == whole
