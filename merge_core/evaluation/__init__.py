"""How good a model is: on tasks that anybody may write, and at predicting a text.

    task = tasks.read(Path("sums.jsonl"))
    model, tokenizer = loading.load_model(directory), loading.load_tokenizer(directory)
    scoring.score(model, tokenizer, task).value

tasks       items with a metric, as data
named       a task by its name or its file
scoring     a model on a task: exact match, choice, bits per byte
perplexity  a text of anybody's, window by window
loading     a checkpoint as a model, without running anything that the directory says

Nothing is imported here: tasks need no torch.
"""
