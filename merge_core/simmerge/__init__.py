"""Which models go well together, told from fingerprints of at most 256 KiB, without moving a weight.

    mine, theirs, base = map(Fingerprint.parse, (a, b, c))
    Survey.of([mine, theirs], base, tasks=["maths"]).values[0, 1]       # what a predictor reads

fingerprint  what a model publishes of itself, and its bytes (container)
mini         at most 1 KiB of that, to rank by; index: the nearest among thousands

structural   its weights: norms, sketches and samples, the same bits everywhere and in any order
functional   its predictions: texts without answers, and what it would say next there
pairs        what is known of two models, measured or estimated, and as a vector with names
choosing     what a merge would be worth, the best of all that there are, and what outcomes teach

The paper is SimMerge (arXiv:2601.09473). Without torch and numba at import, but for kernels, compiled,
probing and training: a node reads and compares fingerprints with numpy alone.
"""
