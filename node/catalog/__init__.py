"""What there is to merge: the experts that this node holds, and what its peers say they hold.

    shelf = Shelf(home.experts, hashes=HashCache(home.cache))
    shelf.add(directory, identity=identity, sketch=fingerprint_of, now=time.time())
    book = AdvertBook(store, network="weft")
    book.search(Query(text="ties", architecture="LlamaForCausalLM"), now=time.time())

shelf     own experts on disk, signed, each appearing whole or not at all
expert    one of them, and how it is opened for serving
hashes    digests of checkpoints that were hashed before
licences  SPDX names, what a model card states, what an expression grants
book      the newest valid adverts of every peer; replay, rollback, expiry and contradiction
service   announces own experts, listens to others, answers for adverts and fingerprints
"""
