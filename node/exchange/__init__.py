"""Fetching experts from peers who may lie, stall or die, byte for byte as their publisher signed them.

    fetched = await fetch(model_id, holders, destination, publisher=None, have=shelf, clock=clock)

holder      what a peer must be able to answer, and what this machine already has
lookup      manifest, leaf table, config, plan, fingerprint: what can be had before any agreement
schedule    which leaves from whom next: pure
blueprint   what lies where in the directory to be, checked against the publisher's signature
partial     the directory under construction: verify, write, journal, rename
whole       whether a fetch ended here before
local       tensors that this machine already has
transfer    carries out the schedule
fetch       the steps in order
"""
