"""Which models go well together, told from fingerprints of at most 256 KiB, without moving a weight.

    mine, theirs = Fingerprint.parse(a), Fingerprint.parse(b)
    mine.structure.groups[0].l2

sketch       the arithmetic of norms and sketches, the same bits on every machine and in any order
sketcher     the leaves of a model, in any order, to its structure
structure    a model's weights as norms, sketches and samples of coordinates, by depth and role
fingerprint  structure and behaviour of one model, and their bytes
mini         at most 1 KiB of it, to rank by
index        the nearest among thousands of minis
statistics   what is known of pairs of models

numpy only: the node reads and compares fingerprints without torch and numba.
"""
