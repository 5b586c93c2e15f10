"""The entry point of `weft`: the flags that every verb has, and what an error looks like.

Exit codes: 0 ok, 1 failure, 2 usage, 3 node not running, 4 not enough peers, 5 verification failed,
6 incompatible models, 7 resource limit, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from node.cli import demo, evaluation, evolution, local, merging, network, selection
from node.cli.output import out

EXIT_INTERRUPTED = 130
MERGING = "Merging"

# What to run next after an error that does not know better, by exit code.
_NEXT = {
    2: "weft --help",
    3: "weft up -d",
    4: "weft peers",
    5: "weft verify DIR",
    6: "weft check RECIPE",
}

# typer carries its own copy of click and shows of its errors only this one; its bases are UsageError and
# ClickException, the two that a command line can end in.
_UsageError, _ClickException = typer.BadParameter.__mro__[1:3]

app = typer.Typer(
    name="weft",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Weave LLM experts into one model with your peers, and let anybody verify where it came from.",
)


@app.callback()
def every_verb(
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON envelope on stdout; works before or after the verb.")
    ] = False,
    home: Annotated[
        str | None,
        typer.Option("--home", help="Where this node keeps its things. Else WEFT_HOME.", show_default=False),
    ] = None,
) -> None:
    """Read the flags that stand before the verb."""
    out.as_json = out.as_json or as_json
    if home:
        os.environ["WEFT_HOME"] = home


local.register(app)
evaluation.register(app)
selection.register(app, MERGING)
merging.register(app, MERGING)
evolution.register(app, MERGING)
network.register(app, MERGING)
demo.register(app)


def main() -> NoReturn:
    """Run one verb and end the process with its exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one verb; the exit code says how it ended, and every error is one line with what to do next."""
    words, rest = _split(arguments)
    out.as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    if out.as_json and not words + rest:
        return _fail("no verb is given", "weft --help", 2, "usage")
    try:
        code = app(words + rest, prog_name="weft", standalone_mode=False)
    except typer.Exit as stop:
        code = stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
    except Exception as error:
        return _explain(error)
    if code == EXIT_INTERRUPTED:  # typer turns Ctrl-C into this code without a word
        verb = next((verb for verb in ("merge", "evolve") if verb in words), None)
        other = "weft eval --help" if "eval" in words else "weft jobs ls"
        hint = f"weft {verb} RECIPE -o DIR --resume" if verb else other
        return _fail("interrupted", hint, EXIT_INTERRUPTED, "interrupted")
    return code if isinstance(code, int) else 0


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before a literal `--`, and the rest."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at:]


def _explain(error: Exception) -> int:
    """Print an error that was raised on purpose; anything else is a defect and keeps its traceback."""
    from merge_core.errors import MergeCoreError
    from node.errors import WeftError, exit_code_of, of_system

    if isinstance(error, _ClickException):
        context = getattr(error, "ctx", None)
        command = context.command_path if isinstance(error, _UsageError) and context else "weft"
        why: str = getattr(error, "format_message", lambda: str(error))()
        return _fail(why, f"{command} --help", 2, "usage") if why else 2  # no words at all: help was shown
    if isinstance(error, BrokenPipeError):  # as in: weft search | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError) and error.errno is not None:
        error = of_system(error)
    if not isinstance(error, WeftError | MergeCoreError):
        raise error
    code, kind = exit_code_of(error), str(getattr(error, "kind", type(error).__name__))
    why, *more = error.why.splitlines() or [kind]
    details = {
        "problems": [*more, *getattr(error, "problems", ())],
        "report": getattr(error, "report", None),
    }
    return _fail(why, error.hint or _NEXT.get(code, "weft doctor"), code, kind, details)


def _fail(why: str, hint: str, code: int, kind: str, details: dict[str, Any] | None = None) -> int:
    failure: dict[str, Any] = {"kind": kind, "why": why, "hint": hint, "exit_code": code}
    failure |= {name: value for name, value in (details or {}).items() if value}
    out.failure(failure)
    return code
