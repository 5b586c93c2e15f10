"""Which models go well together, told from fingerprints of at most 256 KiB, without moving a weight.

    mine, theirs = Fingerprint.parse(a), Fingerprint.parse(b)
    mine.structure.groups[0].l2

sketch       the arithmetic of norms and sketches, the same bits on every machine and in any order
structure    a model's weights as norms, sketches and samples of coordinates, by depth and role
fingerprint  structure and behaviour of one model, and their bytes

numpy only: the node reads and compares fingerprints without torch and numba.
"""
