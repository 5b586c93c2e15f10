"""Merging: from a recipe to a signed model, with the steps of the main job in one function.

references  what a recipe's `model:` may say
parents     the models a merge is made of: found before a byte moves, on disk before it starts
merge       the job: plan, obtain, execute in a worker, record, sign, rename into place
records     the files that a merged model carries beside its weights
audit       the job that re-executes a merge
"""
