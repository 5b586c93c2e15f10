"""How good a model is: at the zoo's domains, on items that nothing was trained on, and at predicting a text.

    score(Path("merged"), ("rev", "sort", "brk"))  ->  {"rev": 0.98, "sort": 0.99, "brk": 0.93}
    predict(Path("merged"), text).bits_per_byte    ->  1.14

exact_match  answers decoded greedily, item by item right or wrong
perplexity   a text of anybody's, window by window
loading      a checkpoint as a model, without running anything that the directory says
"""

from merge_core.evaluation.exact_match import score, verdicts
from merge_core.evaluation.perplexity import Prediction, predict

__all__ = ["Prediction", "predict", "score", "verdicts"]
