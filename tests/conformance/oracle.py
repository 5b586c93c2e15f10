"""Run many recipes through mergekit's own command in one process, started with its environment's python.

stdin is a JSON list of {"recipe": path, "out": path}; stdout ends with a list of error texts, "" where all
went well. Its command says a lot on stdout and stderr, so the answer is the last line.
"""

from __future__ import annotations

import json
import sys
import traceback
from importlib.metadata import entry_points


def main() -> None:
    (entry,) = entry_points(group="console_scripts", name="mergekit-yaml")
    command = entry.load()
    options = ["--random-seed", "1", "--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    errors = []
    for job in json.load(sys.stdin):
        try:
            command.main([job["recipe"], job["out"], *options], standalone_mode=False)
            errors.append("")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}"[:300])
            traceback.print_exc()
    print()
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
