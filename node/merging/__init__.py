"""Merging: from a recipe to a signed model, with the steps of the main job in one function.

merge       the job: plan, obtain, execute in a worker, record, sign, rename into place
parents     the models a merge is made of: found before a byte moves, on disk before it starts
remote      the network as a source of parents
overlay     adverts, negotiation, links and shelves: what finding and fetching takes
canvass     asking many peers at once, and not for long
acquire     bringing models here: agree, fetch, vet, shelve
vetting     whether fetched weights are what their fingerprint says
private     what a job fetched for itself alone
references  what a recipe's `model:` may say
hub         the Hugging Face cache on this machine
check       what stands against a merge, and what it takes, from headers alone
how         threads, memory, a text to predict: what does not change the result
inherited   the licence of a merge
card        what a merged model says to people
local       a merge or an audit in the foreground, without a node
audit       the job that re-executes a merge
work        the jobs of a node that are no merges, and tidying up after any
known       where models were seen on this machine
"""
