"""Evolution: the coefficients of a merge, layer by layer, sought by CMA-ES on tasks that are not reported.

    genome = Genome.of(recipe, headers, Shape(layers=4))
    genome.recipe(values)            # an ordinary recipe, whatever the values

genome      which numbers are sought, and the recipe that they are
fitness     what a candidate costs, from its losses and right answers; which items are asked when
search      generations of CMA-ES, asked and told
journal     what was evaluated, line by line, so that a killed search goes on as if nothing had been
candidates  a merge in the memory of a live model, without a checkpoint
run         all of it, over whatever evaluates candidates
record      what a result says of its search

Only candidates imports torch.
"""
