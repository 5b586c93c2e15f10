"""The frozen values that a node thinks in: parsed once at the border, valid from then on.

ids          PeerId, and who signs what
reasons      why an offer is refused, one sentence each
advert       what a peer holds and on which terms
negotiation  Offer, Agreement, Refusal
job          long work as a fold over journalled events
"""
