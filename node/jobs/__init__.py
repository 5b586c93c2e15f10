"""Long work that survives a crash: what a job has reached is journalled, so a resume starts where it stopped.

    journal = Journal.open(home.database)
    job = journal.create("01J…", Created(kind=JobKind.MERGE, title="ties of 3", request={…}), now)
    with journal.lock(job.id):
        journal.append(job.id, Reached(step="plan", value=plan_digest), now)

journal  the SQLite table of events, and one lock per job
runner   attempts at jobs: owned, watched, cancelled, resumed
"""
