"""Small experts that are really trained and merge well: what the demo, tests and benchmarks work on.

    zoo = build(Path("zoo-seed-0"), seed=0)        # of merge_core.zoo.build
    zoo.base, zoo.experts["rev"], zoo.experts["sort"], zoo.experts["brk"]

domains   the character tasks and their fixed splits
text      code, docs and tables, cut from what every Python carries
recipes   what each kind of zoo consists of: demo, text, skills, and a small one for tests
training  the base and the experts
build     ordinary Hugging Face directories on disk, reused when they are complete
tasks     the domains as evaluation tasks: task("rev:test")
threads   torch without threads of its own

An expert has trained on its own domain, and on the *prompts* of the others: there it only learns to keep
the base's predictions. Seeds change initialisation and batch order, never the data.

Nothing is imported here: tasks and recipes need no torch.
"""
