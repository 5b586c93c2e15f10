"""The peer port: bulk bytes between nodes over gRPC, with mutual TLS bound to peer ids.

ports         what serving asks of the rest of the node: Shelf, HeldModel, Entitlements
admitted      whose certificates are accepted now
credentials   how two nodes hand each other their certificates, over the authenticated libp2p stream
calls         how many calls are answered at once
status        node.errors as google.rpc.Status, and back
transport     the options that both ends use
memory        how the allocator is tuned for pieces of 1 MiB
server        the Peer service
client        one peer's Peer service, from the other side: a Holder for node.exchange
links         a client for each peer, shared by all jobs
"""
