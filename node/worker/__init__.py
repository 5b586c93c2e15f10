"""The child process for heavy work: the daemon stays responsive and never imports torch.

    result = await process.run("fingerprint", {"directory": "...", "leaves": "..."}, on_event=print)

process   starts the child, feeds it one request, turns its last line into a result or a typed error
messages  the lines that travel between the two, and the table of errors that cross
tasks     what the child can do, each a function of a request
"""
