"""Choosing what to merge before anything moves: from fingerprints alone, of this machine's models and peers'.

    seeker = Seeker(book=book, shelf=shelf, fingerprints=fingerprints, reach=reach, me=me, clock=clock)
    found = await seeker.find("math")
    table = similarity.compare([mine, found], base=None)

candidate   a model as far as its fingerprint tells of it
seek        finds them: on the shelf, in the cache, at peers; the only part that waits for anybody
here        fingerprints of directories on this machine, computed once
similarity  how alike they are, pair by pair: `weft sim`
auto        what to merge, how and in which order: `weft plan --auto`
outcomes    what merges turned out to be worth, as peers tell each other
informed    a predictor that has heard of outcomes
"""
