"""merge_core: the pure half of weft: tensors, files under a given path, arithmetic.

No network, no clock, no global random numbers.

recipe     what a person wrote (mergekit-compatible YAML)
resolve    a recipe against the headers of its models: what stands against it, what it costs, or the plan
plan       the recipe resolved: canonical bytes with a digest
execute    a plan streamed, tensor by tensor, into a new checkpoint
operators  one file per merge operator
checkpoint manifest, Merkle tree, strict safetensors reader and writer
zoo        small experts that are really trained; evaluation scores them
"""
