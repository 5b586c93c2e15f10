"""Who a node is: keys, what they sign, and what binds them to each other.

    identity = keyring.create(home / "identity", now=time.time())
    envelope = seal(PAYLOAD_TYPE, payload, identity.host)
    payload = open_envelope(envelope, PAYLOAD_TYPE, host_verifier(identity.peer_id))

keys          the Ed25519 host key (the peer id) and the P-256 publisher key (models)
envelopes     DSSE: bytes with their type and signatures
binding       the statement of both keys that they belong to one node; the content of weft.publisher.json
keyring       the three of them on disk, exported and imported
certificates  a TLS certificate that proves a peer id

The only package that imports `cryptography`.
"""
