"""Who may have which shards: an Offer goes out, an Agreement signed by both comes back, or a Refusal.

    negotiation = Negotiation(network=network, provider=provider, requester=requester)
    concluded = await negotiation.propose(peer, purpose=Purpose.MERGE, models=(model_id,), plan=plan.digest)

policy     what this node grants to whom, as data (TOML)
machine    the provider's decisions as a pure function of state, message and facts
messages   signed statements to and from bytes
provider   answers offers and counts what is served: the entitlements of the peer server
requester  makes offers, checks the answers, keeps the agreements
service    the protocol between the two over the network
"""
