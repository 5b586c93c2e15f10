"""How alike two models are, told without moving their weights.

    mine, theirs = Fingerprint.parse(a), Fingerprint.parse(b)
    similarity(mine, theirs).overall.cosine

fingerprint  norms and a seeded sketch of the weights per layer and role; the format, version 1
sketch       the arithmetic, the same bits on every machine

numpy only: the node reads and compares fingerprints without torch.
"""

from merge_core.simmerge.fingerprint import (
    MAX_FINGERPRINT,
    Fingerprint,
    Likeness,
    Similarity,
    compute,
    similarity,
)

__all__ = ["MAX_FINGERPRINT", "Fingerprint", "Likeness", "Similarity", "compute", "similarity"]
