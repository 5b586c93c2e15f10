"""The Recipe: what a person wrote, in mergekit's YAML, for the methods of this engine.

    merge_method: task_arithmetic
    base_model: ./base
    models:
      - model: ./math
        parameters: {weight: 1.0}
      - model: ./code
        parameters: {weight: [0.2, 1.0]}          # a gradient over the layers
    parameters: {lambda: 0.8}
    dtype: bfloat16

Kept from mergekit: slices of layers that are laid on each other; a setting is a scalar, a gradient or a list
of {filter, value}; the narrowest scope that says something about a tensor wins (source, slice, module, all).
Several merges in one file are separated by `---`; all but the last have a `name` that others use as a model.
Refused by name: everything that would be ignored or understood otherwise. `parse` lists all faults of a text
at once, and `parse(recipe.to_yaml()) == recipe`.

values     Recipe, Merge, Slice, Input
settings   what is said of one parameter
read       parse
graph      which merge comes before which
"""

from __future__ import annotations

from merge_core.recipe.read import MAX_RECIPE, parse
from merge_core.recipe.settings import Conditional
from merge_core.recipe.values import DTYPES, Input, Merge, Recipe, Slice, rename

__all__ = [
    "DTYPES",
    "MAX_RECIPE",
    "Conditional",
    "Input",
    "Merge",
    "Recipe",
    "Slice",
    "parse",
    "rename",
]
