"""How nodes reach one another: one port, two implementations that pass the same suite.

    async with network:                                    # start ... stop, both idempotent
        await network.connect("/ip4/192.0.2.7/tcp/4001/p2p/12D3KooW…")
        network.handle("/weft/negotiate/1", answer_offer)  # (peer, bytes) -> bytes
        reply = await network.request(peer, "/weft/negotiate/1", offer, deadline=10)

base        the port, its values, and the framing of requests and replies
flow        token buckets and in-flight slots: what a peer may ask of us at once
upkeep      pings that notice silent peers, and the loop that reconnects with backoff
listening   wildcards made concrete, ports that are taken
switchboard handlers, topics and listeners: what both implementations share
memory      networks inside one process, with loss and partitions, for tests
libp2p      the real one: TCP, Noise, yamux, GossipSub, in a thread of its own; a package with its own tour
"""
