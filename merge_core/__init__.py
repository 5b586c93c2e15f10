"""merge_core: the pure half of weft: tensors, files under a given path, arithmetic.

No network, no clock, no global random numbers. A merge walks down this list:

recipe     what a person wrote (mergekit-compatible YAML)
resolve    a recipe against the headers of its models: what stands against it, what it costs, or the plan
tokenizer  the tokens of the output where a recipe chooses them; chat templates
plan       the recipe resolved: canonical bytes with a digest
execute    a plan streamed, chunk by chunk, into a new checkpoint, or audited against one
operators  one file per formula, listed in one table
trace      what execution had to compute from the weights
functional config, tokenizer and chat template of the output
report     whether the output looks like its parents
checkpoint manifest, Merkle tree, strict safetensors reader and writer

seeding    the keys of chance                     memory    what a merge takes, and how many threads fit
journal    what an interrupted merge has done     flushing  to the disk while more is made
digest     canonical JSON and digests             errors    who must act
config_keys, plain_yaml, files                    what several of these read and write

simmerge   fingerprints: how alike two models are
evolution  the coefficients of a merge, sought by CMA-ES
zoo        small experts that are really trained; evaluation scores them, and any model on a text

All but execute, zoo, evaluation, evolution's candidates and the bodies of operators import neither torch nor
numba.
"""
