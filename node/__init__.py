"""node: everything of weft that talks. Identity, catalogue, negotiation, exchange, merging jobs, provenance, and the CLI."""
