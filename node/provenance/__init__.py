"""Where a model comes from, in formats that strangers' tools can check.

oms        model.sig: every file of a published directory, signed (OpenSSF Model Signing)
"""
