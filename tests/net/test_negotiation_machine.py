"""Negotiation: nothing is entitled without both signatures, in time, in this network, within a quota."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from merge_core.digest import ModelId, sha256
from node.domain.ids import PeerId
from node.domain.negotiation import Agreement, Offer, Purpose, Refusal
from node.domain.reasons import Reason
from node.errors import PeerError, Refused
from node.identity.envelopes import Envelope
from node.identity.keys import HostKey
from node.negotiation import machine, policy
from node.negotiation.messages import countersign, read, sign
from node.negotiation.policy import Policy
from node.negotiation.provider import DAY, Provider
from node.negotiation.requester import Requester
from node.negotiation.service import Negotiation
from node.network.memory import Fabric, MemoryNetwork
from node.store import Store

NOW = 1_760_000_000
ALICE, BOB, CAROL = (HostKey.from_private_bytes(bytes([n]) * 32) for n in range(1, 4))
FREE, PAID, ABSENT = (ModelId(sha256(name)) for name in (b"free", b"paid", b"absent"))
PLAN = sha256(b"the plan")
SIZE = 1 << 20


@dataclass(frozen=True)
class Held:
    licence: str
    size: int = SIZE


class Cupboard(dict[ModelId, tuple[Held, ...]]):
    """Two experts, one under a licence that the default policy grants."""

    def all(self, model_id: ModelId) -> tuple[Held, ...]:
        return self.get(model_id, ())


EXPERTS = Cupboard({FREE: (Held("Apache-2.0"),), PAID: (Held("CC-BY-NC-4.0"),)})


class World:
    """A provider (Alice) and what Bob needs to talk to it."""

    def __init__(self, folder: Path, rules: Policy | None = None) -> None:
        self.now = float(NOW)
        self.banned: set[PeerId] = set()
        self.rules = rules or policy.default()
        self.folder = folder
        self.draws = 0
        self.restart()

    def restart(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        self.store = Store(self.folder / "alice.db")
        self.provider = Provider(
            self.store,
            key=ALICE,
            network="demo",
            experts=EXPERTS,
            policy=self.rules,
            clock=lambda: self.now,
            banned=self.banned.__contains__,
        )

    def live(self) -> tuple[tuple[Agreement, int], ...]:
        """Every agreement under which Alice serves now, and the bytes sent so far."""
        rows = self.store.rows("SELECT answer, sent FROM negotiations WHERE stage = 'agreed'")
        found = ((read(row["answer"]).statement, int(row["sent"])) for row in rows)
        return tuple((a, sent) for a, sent in found if isinstance(a, Agreement) and a.live(self.now))

    def nonce(self) -> str:
        self.draws += 1
        return f"{self.draws:032x}"

    def requester(self, key: HostKey, name: str) -> Requester:
        return Requester(
            Store(self.folder / f"{name}.db"),
            key=key,
            network="demo",
            clock=lambda: self.now,
            nonce=self.nonce,
        )

    def offer(self, **changes: object) -> Offer:
        offer = Offer(
            network="demo",
            requester=BOB.peer_id,
            provider=ALICE.peer_id,
            purpose=Purpose.MERGE,
            models=(FREE,),
            plan=PLAN,
            nonce=self.nonce(),
            issued_at=int(self.now),
            expires_at=int(self.now) + 60,
        )
        return replace(offer, **changes)  # type: ignore[arg-type]

    def send(self, envelope: Envelope, *, sender: HostKey = BOB) -> Agreement | Refusal | Offer:
        self.reply = self.provider.respond(sender.peer_id, envelope.to_bytes())
        return read(self.reply).statement

    def agree(self, offer: Offer | None = None) -> Agreement:
        """The whole negotiation, as an honest requester does it."""
        proposal = self.send(sign(offer or self.offer(), BOB))
        assert isinstance(proposal, Agreement)
        accepted = self.send(countersign(Envelope.parse(self.reply), BOB))
        assert isinstance(accepted, Agreement)
        return accepted


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def reason_of(world: World, offer: Offer) -> Reason:
    refusal = world.send(sign(offer, BOB))
    assert isinstance(refusal, Refusal) and refusal.offer == offer.digest
    return refusal.reason


def covered(world: World, model: ModelId = FREE, nbytes: int = 100, peer: HostKey = BOB) -> Reason | None:
    try:
        world.provider.covers(peer.peer_id, model, nbytes)
    except Refused as refused:
        return refused.reason
    return None


def test_an_agreement_entitles_to_its_models_only_for_its_time(world: World) -> None:
    assert covered(world) is Reason.NOT_ENTITLED
    agreement = world.agree()
    assert covered(world) is None
    assert covered(world, PAID) is Reason.NOT_ENTITLED
    assert covered(world, peer=CAROL) is Reason.NOT_ENTITLED
    world.restart()
    assert covered(world) is None
    assert world.live() == ((agreement, 200),)
    world.now = agreement.expires_at
    assert covered(world) is Reason.NOT_ENTITLED
    world.provider.forget()
    assert world.live() == ()


def test_a_proposal_that_only_the_provider_signed_entitles_to_nothing(world: World) -> None:
    world.send(sign(world.offer(), BOB))
    proposal = Envelope.parse(world.reply)
    assert covered(world) is Reason.NOT_ENTITLED
    refusal = world.send(proposal)
    assert isinstance(refusal, Refusal) and refusal.reason is Reason.NOT_ENTITLED
    with pytest.raises(Refused) as refused:
        world.send(countersign(proposal, CAROL))
    assert refused.value.reason is Reason.MALFORMED
    forged = replace(proposal, signatures={**proposal.signatures, BOB.peer_id: bytes(64)})
    with pytest.raises(Refused):
        world.send(forged)
    only_bob = sign(read(proposal.to_bytes()).statement, BOB)
    refusal = world.send(only_bob)
    assert isinstance(refusal, Refusal) and refusal.reason is Reason.NOT_ENTITLED
    assert covered(world) is Reason.NOT_ENTITLED


def test_an_agreement_that_the_requester_made_up_entitles_to_nothing(world: World) -> None:
    world.send(sign(world.offer(), BOB))
    proposed = read(world.reply).statement
    assert isinstance(proposed, Agreement)
    better = replace(proposed, max_bytes=2**50)
    refusal = world.send(sign(better, BOB))
    assert isinstance(refusal, Refusal) and refusal.reason is Reason.NOT_ENTITLED
    assert covered(world) is Reason.NOT_ENTITLED


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"network": "other"}, Reason.WRONG_NETWORK),
        ({"provider": CAROL.peer_id}, Reason.MALFORMED),
        ({"issued_at": NOW - 120, "expires_at": NOW}, Reason.EXPIRED),
        ({"issued_at": NOW + 1000, "expires_at": NOW + 1060}, Reason.EXPIRED),
        ({"models": (ABSENT,)}, Reason.UNKNOWN_MODEL),
        ({"plan": None}, Reason.MALFORMED),
        ({"plan": None, "purpose": Purpose.AUDIT}, Reason.MALFORMED),
        ({"models": tuple(sorted((FREE, PAID)))}, Reason.LICENCE_NOT_GRANTED),
    ],
)
def test_an_offer_is_refused_with_its_reason(world: World, change: dict[str, object], reason: Reason) -> None:
    assert reason_of(world, world.offer(**change)) is reason
    assert world.live() == ()


def test_a_mirror_has_no_plan_to_name(world: World) -> None:
    assert world.agree(world.offer(purpose=Purpose.MIRROR, plan=None)).plan is None


def test_the_policy_says_who_for_what_and_how_much(tmp_path: Path) -> None:
    base = policy.default()
    for number, (rules, reason) in enumerate(
        [
            (replace(base, deny=frozenset({BOB.peer_id})), Reason.PEER_NOT_ALLOWED),
            (replace(base, allow=frozenset({CAROL.peer_id})), Reason.PEER_NOT_ALLOWED),
            (replace(base, purposes=frozenset({Purpose.AUDIT})), Reason.PURPOSE_NOT_ALLOWED),
            (replace(base, licences=frozenset({"MIT"})), Reason.LICENCE_NOT_GRANTED),
            (replace(base, bytes_per_peer_per_day=SIZE - 1), Reason.QUOTA_EXCEEDED),
            (replace(base, agreements_per_peer=0), Reason.BUSY),
        ]
    ):
        folder = tmp_path / str(number)
        world = World(folder, rules)
        assert reason_of(world, world.offer()) is reason
        assert len(reason.sentence) > 20


def test_a_copy_under_a_laxer_licence_does_not_launder_a_model(world: World) -> None:
    EXPERTS[PAID] = (Held("CC-BY-NC-4.0"), Held("MIT"))
    try:
        assert reason_of(world, world.offer(models=(PAID,))) is Reason.LICENCE_NOT_GRANTED
    finally:
        EXPERTS[PAID] = (Held("CC-BY-NC-4.0"),)


def test_a_peer_that_contradicted_itself_gets_nothing_more(world: World) -> None:
    world.agree()
    world.send(sign(world.offer(), BOB))
    proposal = Envelope.parse(world.reply)
    world.banned.add(BOB.peer_id)
    assert covered(world) is Reason.PEER_NOT_ALLOWED
    assert reason_of(world, world.offer()) is Reason.PEER_NOT_ALLOWED
    refusal = world.send(countersign(proposal, BOB))
    assert isinstance(refusal, Refusal) and refusal.reason is Reason.PEER_NOT_ALLOWED


def test_the_provider_says_whom_it_serves_and_who_has_an_agreement(world: World) -> None:
    assert world.provider.serves(BOB.peer_id) and not world.provider.engaged()
    world.send(sign(world.offer(), BOB))
    assert not world.provider.engaged(), "a proposal is no agreement"
    agreement = world.agree()
    assert world.provider.engaged() == {BOB.peer_id}
    world.now = agreement.expires_at
    assert not world.provider.engaged()
    world.banned.add(BOB.peer_id)
    assert not world.provider.serves(BOB.peer_id)


def test_the_same_words_again_change_nothing(world: World) -> None:
    offer = world.offer()
    first = world.send(sign(offer, BOB))
    assert world.send(sign(offer, BOB)) == first
    accepted = countersign(Envelope.parse(world.reply), BOB)
    world.send(accepted)
    world.send(accepted)
    assert world.send(sign(offer, BOB)) == first
    assert read(world.reply).signers == {ALICE.peer_id, BOB.peer_id}
    assert len(world.live()) == 1
    other = replace(offer, purpose=Purpose.MIRROR)
    assert reason_of(world, other) is Reason.MALFORMED
    with pytest.raises(Refused) as refused:
        world.send(accepted, sender=CAROL)
    assert refused.value.reason is Reason.PEER_NOT_ALLOWED


def test_bytes_are_counted_against_the_agreement_and_the_day(tmp_path: Path) -> None:
    world = World(tmp_path, replace(policy.default(), bytes_per_peer_per_day=60 << 20))
    agreement = world.agree()
    assert covered(world, nbytes=agreement.max_bytes) is None
    assert covered(world, nbytes=1) is Reason.NOT_ENTITLED
    world.agree()
    world.agree()
    assert covered(world, nbytes=agreement.max_bytes) is None
    assert world.provider.served(BOB.peer_id, world.now) == 2 * agreement.max_bytes
    assert covered(world, nbytes=agreement.max_bytes) is None
    assert covered(world, nbytes=9 << 20) is Reason.NOT_ENTITLED
    world.agree()
    assert covered(world, nbytes=9 << 20) is Reason.QUOTA_EXCEEDED
    world.now += DAY
    world.agree()
    assert covered(world, nbytes=9 << 20) is None


@pytest.mark.parametrize("junk", [b"", b"{}", b"\xff" * 100, b"[" * 50_000, b" " * 70_000])
def test_junk_is_refused_as_malformed(world: World, junk: bytes) -> None:
    with pytest.raises(Refused) as refused:
        world.provider.respond(BOB.peer_id, junk)
    assert refused.value.reason is Reason.MALFORMED


def test_a_requester_believes_no_answer_to_something_else(world: World) -> None:
    bob = world.requester(BOB, "bob")
    about = {"purpose": Purpose.MERGE, "models": [FREE], "plan": PLAN}
    offer, message = bob.offer(ALICE.peer_id, **about)  # type: ignore[arg-type]
    other, other_message = bob.offer(ALICE.peer_id, **about)  # type: ignore[arg-type]
    answer = world.provider.respond(BOB.peer_id, message)
    proposed = read(answer).statement
    assert isinstance(proposed, Agreement)
    wrong = [
        b"nonsense",
        message,
        world.provider.respond(BOB.peer_id, other_message),
        sign(replace(proposed, models=(FREE, PAID)), ALICE).to_bytes(),
        sign(replace(proposed, plan=sha256(b"p")), ALICE).to_bytes(),
        sign(replace(proposed, not_before=1, expires_at=2), ALICE).to_bytes(),
        sign(proposed, BOB).to_bytes(),
        sign(proposed, CAROL).to_bytes(),
    ]
    for data in wrong:
        with pytest.raises(PeerError):
            bob.accept(offer, data)
    with pytest.raises(PeerError, match="lacks a signature"):
        bob.conclude(offer, answer)
    assert bob.usable(ALICE.peer_id, **about) is None  # type: ignore[arg-type]
    assert other.nonce != offer.nonce


def test_both_sides_forget_what_is_over(world: World) -> None:
    bob = world.requester(BOB, "bob")
    about = {"purpose": Purpose.MERGE, "models": [FREE], "plan": PLAN}

    def agree() -> Agreement:
        offer, message = bob.offer(ALICE.peer_id, **about)  # type: ignore[arg-type]
        accepted = bob.accept(offer, world.provider.respond(BOB.peer_id, message))
        return bob.conclude(offer, world.provider.respond(BOB.peer_id, accepted)).agreement

    first = agree()
    world.now += 10
    newest = agree()
    usable = bob.usable(ALICE.peer_id, **about)  # type: ignore[arg-type]
    assert usable is not None and usable.agreement == newest
    ours = Store(world.folder / "bob.db")
    tidy = Provider(
        ours,
        key=BOB,
        network="demo",
        experts={},
        policy=world.rules,
        clock=lambda: world.now,
        banned=lambda peer: False,
    )
    for now, left in ((first.expires_at - 1, 2), (first.expires_at, 1), (newest.expires_at, 0)):
        world.now = now
        tidy.forget()
        assert len(ours.rows("SELECT offer FROM negotiations")) == left
    assert bob.usable(ALICE.peer_id, **about) is None  # type: ignore[arg-type]


def test_two_nodes_agree_over_the_network(world: World) -> None:
    fabric = Fabric(seed=1)

    async def story() -> None:
        async with (
            MemoryNetwork(fabric, ALICE.peer_id) as theirs,
            MemoryNetwork(fabric, BOB.peer_id) as ours,
        ):
            Negotiation(
                network=theirs, provider=world.provider, requester=world.requester(ALICE, "alice-asks")
            ).start()
            await ours.connect(theirs.addresses()[0])
            negotiation = Negotiation(
                network=ours, provider=world.provider, requester=world.requester(BOB, "bob")
            )
            plan = sha256(b"plan")
            about = {"purpose": Purpose.MERGE, "models": [FREE], "plan": plan}
            concluded = await negotiation.propose(ALICE.peer_id, **about)  # type: ignore[arg-type]
            assert concluded.agreement.plan == plan
            assert read(concluded.envelope.to_bytes()).signers == {ALICE.peer_id, BOB.peer_id}
            assert covered(world) is None
            again = await negotiation.propose(ALICE.peer_id, **about)  # type: ignore[arg-type]
            assert again == concluded
            fresh = await negotiation.propose(ALICE.peer_id, fresh=True, **about)  # type: ignore[arg-type]
            assert fresh.agreement.digest != concluded.agreement.digest
            with pytest.raises(Refused) as refused:
                await negotiation.propose(ALICE.peer_id, purpose=Purpose.MERGE, models=[PAID], plan=plan)
            assert refused.value.reason is Reason.LICENCE_NOT_GRANTED
            assert refused.value.detail == "CC-BY-NC-4.0"

    asyncio.run(story())


digests = st.binary(min_size=1, max_size=4).map(sha256)
moments = st.integers(0, 2**40)
parties = st.sampled_from([ALICE.peer_id, BOB.peer_id, CAROL.peer_id])
models_of = st.lists(digests.map(ModelId), min_size=1, max_size=5, unique=True).map(
    lambda m: tuple(sorted(m))
)


@given(
    parties, parties, st.sampled_from(Purpose), models_of, st.none() | digests, moments, st.integers(1, 3600)
)
def test_an_offer_survives_its_bytes(
    requester: PeerId,
    provider: PeerId,
    purpose: Purpose,
    models: tuple[ModelId, ...],
    plan: object,
    issued: int,
    seconds: int,
) -> None:
    offer = Offer(
        network="demo",
        requester=requester,
        provider=provider,
        purpose=purpose,
        models=models,
        plan=plan,  # type: ignore[arg-type]
        nonce="0" * 32,
        issued_at=issued,
        expires_at=issued + seconds,
    )
    assert Offer.parse(offer.to_bytes()) == offer
    for parse in (Agreement.parse, Refusal.parse):
        with pytest.raises(ValueError, match="exactly the keys"):
            parse(offer.to_bytes())


def test_a_reason_of_a_newer_weft_is_still_a_refusal() -> None:
    refusal = Refusal(
        offer=sha256(b"o"),
        provider=ALICE.peer_id,
        requester=BOB.peer_id,
        reason=Reason.BUSY,
        detail="later",
    )
    assert Refusal.parse(refusal.to_bytes()) == refusal
    newer = refusal.to_bytes().replace(b'"BUSY"', b'"TOO_HOT"')
    assert Refusal.parse(newer).reason is Reason.UNSPECIFIED


QUOTA = 3 * (SIZE + SIZE // 4 + machine.SPARE_BYTES)


class Bargaining(RuleBasedStateMachine):
    """Bob and Carol say anything in any order; the model remembers only what both really signed in time."""

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        rules = replace(
            policy.default(), bytes_per_peer_per_day=QUOTA, agreements_per_peer=6, agreement_seconds=500
        )
        self.world = World(Path(self.folder.name), rules)
        self.offers: list[tuple[Offer, HostKey]] = []
        self.proposals: list[tuple[Agreement, Envelope, HostKey]] = []
        self.agreed: dict[str, Agreement] = {}
        self.sent: dict[str, int] = {}
        self.served: dict[tuple[str, int], int] = {}

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.store.close()
            self.folder.cleanup()

    @rule(
        key=st.sampled_from([BOB, CAROL]),
        model=st.sampled_from([FREE, FREE, FREE, PAID, ABSENT]),
        network=st.sampled_from(["demo", "demo", "demo", "other"]),
        age=st.sampled_from([0, 0, 0, 59, 60, -400]),
    )
    def offer(self, key: HostKey, model: ModelId, network: str, age: int) -> None:
        offer = self.world.offer(
            requester=key.peer_id,
            models=(model,),
            network=network,
            issued_at=int(self.world.now) - age,
            expires_at=int(self.world.now) - age + 60,
        )
        self.offers.append((offer, key))
        self.say(offer, key)

    @rule(pick=st.integers(0, 100))
    def replay_offer(self, pick: int) -> None:
        if self.offers:
            self.say(*self.offers[pick % len(self.offers)])

    @rule(pick=st.integers(0, 100))
    def reuse_nonce(self, pick: int) -> None:
        if self.proposals:
            agreement, _, key = self.proposals[pick % len(self.proposals)]
            offer = next(o for o, _ in self.offers if o.digest == agreement.offer)
            if offer.expires_at > self.world.now:
                reply = self.world.send(sign(replace(offer, purpose=Purpose.AUDIT), key), sender=key)
                assert isinstance(reply, Refusal) and reply.reason is Reason.MALFORMED

    def say(self, offer: Offer, key: HostKey) -> None:
        reply = self.world.send(sign(offer, key), sender=key)
        if isinstance(reply, Agreement):
            assert offer.network == "demo" and offer.models == (FREE,)
            assert offer.expires_at > self.world.now >= offer.issued_at - machine.MAX_CLOCK_SKEW
            assert reply.answers(offer)
            if reply.digest not in {known.digest for known, _, _ in self.proposals}:
                assert offer.digest not in {known.offer for known, _, _ in self.proposals}
                only_ours = Envelope.parse(self.world.reply)
                assert set(only_ours.signatures) == {ALICE.peer_id}
                self.proposals.append((reply, only_ours, key))

    @rule(pick=st.integers(0, 100), how=st.sampled_from(["both", "both", "both", "one", "other"]))
    def accept(self, pick: int, how: str) -> None:
        if not self.proposals:
            return
        agreement, proposal, key = self.proposals[pick % len(self.proposals)]
        envelope = {
            "both": countersign(proposal, key),
            "one": proposal,
            "other": countersign(proposal, CAROL if key is BOB else BOB),
        }[how]
        try:
            reply = self.world.send(envelope, sender=key)
        except Refused as refused:
            assert how == "other" and refused.reason is Reason.MALFORMED
            return
        if isinstance(reply, Agreement):
            assert how == "both" or agreement.digest in self.agreed
            assert agreement.expires_at > self.world.now
            self.agreed[agreement.digest] = agreement
        elif how == "both":
            assert isinstance(reply, Refusal) and reply.reason in (Reason.EXPIRED, Reason.NOT_ENTITLED)

    @rule(
        key=st.sampled_from([BOB, CAROL]),
        model=st.sampled_from([FREE, FREE, PAID]),
        nbytes=st.sampled_from([1, SIZE, machine.SPARE_BYTES, QUOTA]),
    )
    def fetch(self, key: HostKey, model: ModelId, nbytes: int) -> None:
        now, day = self.world.now, int(self.world.now // DAY)
        live = [
            a
            for a in self.agreed.values()
            if a.requester == key.peer_id and model in a.models and a.live(now)
        ]
        room = sum(a.max_bytes for a in live) - sum(self.sent.get(a.digest, 0) for a in live)
        served = self.served.get((key.peer_id, day), 0)
        reason = covered(self.world, model, nbytes, key)
        if reason is None:
            assert live and nbytes <= room and served + nbytes <= QUOTA
            self.served[key.peer_id, day] = served + nbytes
            for agreement, sent in self.world.live():
                self.sent[agreement.digest] = sent
        else:
            assert reason in (Reason.NOT_ENTITLED, Reason.QUOTA_EXCEEDED)
            if live and nbytes <= max(a.max_bytes - self.sent.get(a.digest, 0) for a in live):
                assert reason is Reason.QUOTA_EXCEEDED and served + nbytes > QUOTA

    @rule(seconds=st.sampled_from([1, 61, 400, DAY]))
    def wait(self, seconds: int) -> None:
        self.world.now += seconds

    @rule()
    def restart(self) -> None:
        self.world.restart()

    @rule()
    def forget(self) -> None:
        self.world.provider.forget()

    @invariant()
    def only_what_both_signed_is_live(self) -> None:
        if hasattr(self, "world"):
            live = {agreement.digest for agreement, _ in self.world.live()}
            assert live == {d for d, a in self.agreed.items() if a.live(self.world.now)}
            for agreement, sent in self.world.live():
                assert sent <= agreement.max_bytes


TestBargaining = Bargaining.TestCase
TestBargaining.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
