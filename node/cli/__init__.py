"""The command `weft`: what a person types and sees.

    main      entry point: flags that every verb has, errors and exit codes
    output    stdout is data, stderr is the story
    local     verbs that need no running node: init id add ls rm verify lineage doctor version
    merging   verbs that make models of models: check plan merge
    network   verbs that talk to the node: up down status peers invite join get search jobs
    demo      three nodes on this machine, from training to a verified merge

Nothing here imports torch or libp2p, and services are imported only by the verb that uses them,
so that `weft --help` answers at once.
"""
