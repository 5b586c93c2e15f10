"""node: everything of weft that talks.

identity catalog negotiation exchange merging provenance   services: pure deciding, thin IO
network peer control     libp2p overlay, peer data plane, local API
domain wire              frozen values, and their protobuf spelling
worker                   the child process in which heavy work runs
cli app                  what a person types, and what ties the rest together
"""
