"""The control API: what the CLI, a dashboard or an SDK asks of the node on this machine.

server   gRPC on loopback, behind a token; health and reflection
client   the same calls for a command line, with typed errors
status   our errors as google.rpc.Status and back
running  which node runs for a home, and where
"""
