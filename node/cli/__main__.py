"""`python -m node.cli`: the command without its script, as `weft up -d` starts it."""

from node.cli.main import main

main()
