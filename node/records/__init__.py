"""What peers say about models and sign: every node keeps the same of it, whatever the order it came in.

    book = RecordBook(store, kind, network="weft", me=key.peer_id)
    gossip = RecordGossip(network, book, key, clock=clock)
    await gossip.say(body)

book    the records of one kind: checked, each once, bounded by author and in all
gossip  sends this node's records out, takes those of others in, asks newcomers for theirs
"""
