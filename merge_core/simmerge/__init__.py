"""Which models go well together, told from fingerprints of at most 256 KiB, without moving a weight.

    mine, theirs, base = map(Fingerprint.parse, (a, b, c))
    Survey.of([mine, theirs], base, tasks=["maths"]).values[0, 1]       # what a predictor reads

What a model publishes of itself:

sketch, kernels  the arithmetic of norms and sketches, the same bits everywhere and in any order; compiled
sketcher         the leaves of a model, in any order, to its structure
structure        its weights as norms, sketches and samples of coordinates, by depth and role
probes           texts without answers; probing: a model reads them; behaviour: what it would say
fingerprint      structure and behaviour, and their bytes (container)
mini             at most 1 KiB of it, to rank by; index: the nearest among thousands

What is known of two:

statistics       the one shape, for weights; divergence: for predictions
exact            measured from two checkpoints (products: the formulas)
structure_panel  estimated from structures; panel, matching: from behaviours
features         as a vector with a name for each number; survey: of all pairs of some models

What to do with them (paper: SimMerge, arXiv:2601.09473):

chains           which merges there are to choose among; blending: the fingerprint that one would have
predictor        what a merge would be worth; training; forecast, plans: the best of all chains
outcomes         what merges turned out to be worth; bandit: what many of them teach

Without torch and numba at import, but for kernels, matching, probing and training: a node reads and compares
fingerprints with numpy alone.
"""
