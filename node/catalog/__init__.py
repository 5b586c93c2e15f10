"""What there is to merge: the experts that this node holds, and what its peers say they hold.

    shelf = Shelf(home.experts, hashes=HashCache(home.cache))
    shelf.add(directory, identity=identity, sketch=partial(sketch_in_worker, probes="general"), now=now)
    book = AdvertBook(store, network="weft", me=identity.peer_id)
    book.search(Query(text="ties", architecture="LlamaForCausalLM"), now=time.time())

shelf         own experts on disk, signed, each appearing whole or not at all
expert        one of them, and how it is opened for serving
hashes        digests of checkpoints that were hashed before
licences      SPDX names, what a model card states, what an expression grants
sketching     fingerprints of what is added, computed in a worker
book          the newest valid adverts of every peer; replay, rollback, expiry and contradiction
room          who leaves the book when it is full: connections count, names do not
gossip        sends this node's adverts out and takes those of others in
fingerprints  and minis by digest, from peers and for peers
fingerprint_cache  those of others that came here before
"""
