"""A model's weights as a Structure: the same bits on every machine, whatever the order of its leaves.

sketch     the arithmetic of norms and sketches; kernels: the same, compiled
sketcher   the leaves of a model, in any order, to its structure
structure  norms, sketches and samples of coordinates, by depth and role
"""
