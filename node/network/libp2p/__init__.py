"""The real network: py-libp2p over TCP with Noise and yamux, in a trio thread of its own.

    async with Libp2pNetwork(host_key.private_bytes, ["/ip4/0.0.0.0/tcp/9350"]) as network:
        await network.connect("/ip4/192.0.2.7/tcp/9350/p2p/12D3KooW…")

Two loops, one rule: what belongs to libp2p is touched in the trio thread only, what belongs to the node on
the event loop only, and a Bridge carries calls between them without ever blocking either. Should the trio
thread end by itself, its connections are reported as closed and another one is started.

On the event loop:
network      Libp2pNetwork: the port, and starting the thread again after a crash
bridge       calls from one loop to the other
callbacks    what the thread may ask of the event loop

In the trio thread:
core         one life of the thread: builds the parts below, runs them, closes them
host         the host, put together from its parts; what a single stream may do to it
connections  dialling, hanging up, and telling who is there
streams      requests, replies and pings, each on a stream of its own
gossip       publishing, and judging what neighbours pass on
swarm        classes of py-libp2p below a connection, changed where they do not fit
pubsub       the same for its gossip

Without a loop: addresses, deadlines, errors, logs.

What py-libp2p 0.8.1 does that is guarded against here:
- `new_host()` accepts plaintext and mplex, so the host is put together from its parts: Noise and yamux only;
- an exception in a stream handler (for example a malformed pubsub frame) stops the whole swarm;
- a slot of the inbound limiter is held until the swarm ends, not until the connection does;
- listening sockets are opened with SO_REUSEPORT, so a port that is taken is noticed by nobody;
- a failed dial blocks further dials of that peer for a minute, and dialling prefers remembered addresses;
- an auto-connector dials remembered peers whatever the watermarks say, also those that we dropped;
- gossip is dropped silently above 10 messages a second, and behind an outbound queue of 32 frames;
- a message of our own reaches the mesh only, not every neighbour on the topic;
- it logs through the root logger, which prints to stderr when nobody configured logging.
"""

from node.network.libp2p.network import Libp2pNetwork

__all__ = ["Libp2pNetwork"]
