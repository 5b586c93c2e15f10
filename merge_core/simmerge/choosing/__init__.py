"""What to do with pairs of models (SimMerge, arXiv:2601.09473): predict, choose, learn from what came of it.

chains     which merges there are to choose among; blending: the fingerprint that one would have
predictor  what a merge would be worth, task by task and operator by operator; training: how that is learned
forecast   what chains would be worth, and why; plans: the best of all
outcomes   what merges turned out to be worth; bandit: what many of them teach
"""
