"""Where a model comes from, in formats that strangers' tools can check.

    attest.publish(directory, identity, manifest)
    report = verify(directory, now=time.time())
    print(report.ok, [check.detail for check in report.checks if check.ok is False])

oms         model.sig: every file of a published directory, signed (OpenSSF Model Signing)
statement   provenance.dsse.json: what a merge was made of and how (in-toto, SLSA, DSSE)
agreements  weft.agreements.json: the negotiation that both sides signed
attest      what a node does to publish: records, statement, signature
verify      the green and red list over all of these
lineage     the tree of ancestors that the statements span
audit       the verdict of somebody who ran the merge again (VSA), kept beside the model
measurement weft.evaluations.jsonl: what somebody measured of the model, line by line
fingerprint a fingerprint, and what its author swears to
fault       a fingerprint that the weights do not have: evidence that anybody can check
proven      a statement and its signer's record as one line
files       records on disk: bounded, no links
"""
