"""How good a model is at the zoo's domains: exact match on items that nothing was trained on.

    score(Path("merged"), ("rev", "sort", "brk"))  ->  {"rev": 0.98, "sort": 0.99, "brk": 0.93}

exact_match  answers decoded greedily, item by item right or wrong
loading      a Llama checkpoint as a model, without running anything that the directory says
"""

from merge_core.evaluation.exact_match import score, verdicts

__all__ = ["score", "verdicts"]
