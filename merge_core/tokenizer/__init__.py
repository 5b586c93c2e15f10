"""Tokenizers and chat templates of a merge, read as plain JSON: nothing here imports a tokenizer library.

choice       what a recipe says: which tokenizer, which rules for single tokens
templates    chat templates: by name, in words, or the one that most inputs have
vocabulary   the tokens of a model, from its files, which may come from anybody
union        the output's vocabulary, and the files that hold it
plan         the TokenizerPlan, which a step of a MergePlan carries
resolve      from a choice and what is known of the models to a TokenizerPlan
rows         which row of which model each row of the output is taken from
"""
