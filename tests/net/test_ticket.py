"""A ticket says where a network can be joined, and nothing that is not one passes for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.domain.ticket import Ticket

PEER = "12D3KooWDonxqBVySYsyWdFJ2rJHfT6z17JDJ7rHZwSNzF7BPQkx"
TICKET = Ticket(
    network="family", addresses=(f"/ip4/192.0.2.7/tcp/9350/p2p/{PEER}", f"/ip6/::1/tcp/9350/p2p/{PEER}")
)


def test_a_ticket_survives_being_pasted() -> None:
    assert Ticket.parse(f"  {TICKET}\n") == TICKET
    assert TICKET.peer == PEER


@given(st.integers(0, 200), st.characters())
def test_a_damaged_ticket_is_refused_or_is_another_ticket(position: int, letter: str) -> None:
    text = str(TICKET)
    damaged = text[: position % len(text)] + letter + text[position % len(text) + 1 :]
    try:
        assert str(Ticket.parse(damaged)) == damaged.strip()
    except ValueError:
        return


def test_addresses_that_lead_to_two_peers_are_no_ticket() -> None:
    other = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
    ticket = Ticket(network="family", addresses=(TICKET.addresses[0], f"/ip4/192.0.2.8/tcp/1/p2p/{other}"))
    with pytest.raises(ValueError, match="one peer"):
        Ticket.parse(str(ticket))


@pytest.mark.parametrize(
    ("transport", "why"),
    [
        ("/ip4/192.0.2.7/tcp/1/\U0001f600", "not a complete TCP multiaddr"),
        ("nonsense", "not a complete TCP multiaddr"),
        ("", "not a complete TCP multiaddr"),
        ("/ip4/192.0.2.7/udp/1", "not a complete TCP multiaddr"),
        ("/ip4/192.0.2.777/tcp/1", "Octet 777"),
    ],
)
def test_an_address_that_no_node_could_dial_is_no_ticket(transport: str, why: str) -> None:
    ticket = Ticket(network="family", addresses=(TICKET.addresses[0], f"{transport}/p2p/{PEER}"))
    with pytest.raises(ValueError, match=why):
        Ticket.parse(str(ticket))


@given(st.text())
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="ticket"):
        Ticket.parse(text)
