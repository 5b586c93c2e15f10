"""Resolution: a recipe against the headers of its models, before a byte of weights moves.

    check(recipe, headers)   every incompatibility at once, and what the merge will cost; needs headers only
    draft(recipe, headers)   a Draft with its Estimate, or Unmergeable
    draft.seal(model_ids)    the MergePlan: inputs by ModelId, every parameter of every tensor

Names and shapes decide what can be merged; there is no table of architectures. The output has the tensors of
the donor (the base, else the first model), or of the slices that lie on each other.

header     what is known of a model without its weights
stack      its tensors, layer by layer
sites      which tensors of which models belong together
head       whether the head is tied to the embedding
layers     what a config says of layers that are chosen anew
tokens     what its tokens are, where the recipe chooses them
merging    one merge
drafting   all merges of a recipe, and what nobody needs of them
estimate   what it costs
telling    whether a published recipe tells of a plan
"""

from __future__ import annotations

from merge_core.resolve.drafting import Draft, check, draft
from merge_core.resolve.estimate import Estimate
from merge_core.resolve.header import ModelHeader, header_of, header_of_manifest
from merge_core.resolve.telling import tells_of

__all__ = [
    "Draft",
    "Estimate",
    "ModelHeader",
    "check",
    "draft",
    "header_of",
    "header_of_manifest",
    "tells_of",
]
