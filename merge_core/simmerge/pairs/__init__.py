"""What is known of ordered pairs of models: in one shape, from two checkpoints or from fingerprints.

statistics   the one shape, for weights; divergence: for predictions
exact        measured from two checkpoints and their base (products: the formulas)
structures   estimated from structures; behaviours: from behaviours (compiled: the same, many times as fast)
features     as a vector with a name for each number; survey: of all pairs of some models
"""
