"""Does learning from outcomes pay? A stream of merges, in the midst of which an operator and a task are new.

    python tests/bench/bandit.py --seeds 20 21 22

The story goes to stderr; the last line of stdout is one JSON object. The predictor that everything begins
with was trained on the tuning catalogues without the operator and the task that arrive midway. Every merge is
of a pair drawn from a catalogue that it has not seen; its utility is measured on the labels' items, and so is
that of all others. Regret is against the best operator of each merge among those that there are; beside it
stands that of the best fixed operator in hindsight, a new one from the middle on. Intervals are over streams.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import platformdirs
from catalogue import tell
from simmerge import SETTINGS, TUNING, World, joined, opened

from merge_core.digest import sha256
from merge_core.simmerge.choosing.bandit import Bandit
from merge_core.simmerge.choosing.chains import OPERATORS
from merge_core.simmerge.choosing.outcomes import Outcome
from merge_core.simmerge.choosing.predictor import Predictor
from merge_core.simmerge.choosing.training import Cells, train
from merge_core.simmerge.pairs.features import NAMES
from merge_core.zoo.threads import one_thread_each

LENGTH = 200
STREAMS = 5
"""For each catalogue."""
NEW_OPERATOR = "task_arithmetic"
NEW_TASK = "rot"
COURAGE = 0.03
"""What a width counts for; chosen on the tuning catalogues."""
MARKS = tuple(range(20, LENGTH + 1, 20))

Doubles = npt.NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22])
    cache = Path(platformdirs.user_cache_dir("weft")) / "catalogue"
    parser.add_argument(
        "--directory", type=Path, default=cache, help=f"keep catalogues there, not in {cache}"
    )
    arguments = parser.parse_args()
    with one_thread_each():
        tuning = opened(arguments.directory, TUNING, chains=False)
        worlds = (
            tuning
            if tuple(arguments.seeds) == TUNING
            else opened(arguments.directory, arguments.seeds, chains=False)
        )
        print(json.dumps(report(worlds, begun(tuning))))


def begun(worlds: Sequence[World]) -> Predictor:
    """A predictor that has heard neither of the new operator nor of the new task."""
    kept = []
    for world in worlds:
        rows = np.array([task != NEW_TASK for _, task in world.rows] * 2)
        kept.append(world.cells[rows])
    cells = joined(kept)
    known = [operator for operator in OPERATORS if operator != NEW_OPERATOR]
    columns = [OPERATORS.index(operator) for operator in known]
    return train(
        Cells(values=cells.values, missing=cells.missing, utility=cells.utility[:, columns]),
        names=NAMES,
        operators=known,
        provenance={"seeds": [world.seed for world in worlds]},
        settings=SETTINGS,
    )


def report(worlds: Sequence[World], predictor: Predictor) -> dict[str, Any]:
    """Cumulative regret of the bandit, of the predictor alone, and of fixed operators."""
    curves: dict[str, list[Doubles]] = {}
    for world in worlds:
        for stream in range(STREAMS):
            for name, regret in streamed(world, predictor, stream).items():
                curves.setdefault(name, []).append(np.cumsum(regret))
        tell(f"seed {world.seed}: {STREAMS} streams")
    stacked = {name: np.stack(each) for name, each in curves.items()}
    ahead = stacked["best_fixed"][:, -1] - stacked["bandit"][:, -1]
    rng = np.random.default_rng(0)
    drawn = [rng.choice(ahead, size=len(ahead)).mean() for _ in range(2_000)]
    return {
        "seeds": [world.seed for world in worlds],
        "merges": LENGTH,
        "new_operator": NEW_OPERATOR,
        "new_task": NEW_TASK,
        "at": list(MARKS),
        "regret": {
            name: [round(float(each[:, mark - 1].mean()), 3) for mark in MARKS]
            for name, each in stacked.items()
        },
        "saved": {
            "mean": round(float(ahead.mean()), 3),
            "ci95": [round(float(each), 3) for each in np.percentile(drawn, [2.5, 97.5])],
        },
    }


def streamed(world: World, predictor: Predictor, stream: int) -> dict[str, Doubles]:
    """The regret of each merge: [merges] by who chose."""
    rng = random.Random(f"weft bandit {world.seed} {stream}")
    bandit, order = Bandit(predictor), drawn_pairs(world, rng)
    regret: dict[str, list[float]] = {name: [] for name in ("bandit", "predictor", "random", *OPERATORS)}
    for step, pair in enumerate(order):
        there = [o for o in OPERATORS if o != NEW_OPERATOR or step >= LENGTH // 2]
        rows = cells_of(world, pair)
        values, missing = world.cells.values[rows], world.cells.missing[rows]
        worth = dict(zip(OPERATORS, world.cells.utility[rows].mean(axis=0).tolist(), strict=True))
        judged = bandit.judge(values, missing, there)
        chosen = there[int(judged.optimistic(COURAGE).mean(axis=0).argmax())]
        alone = Bandit(predictor).judge(values, missing, there).utility.mean(axis=0)
        best = max(worth[o] for o in there)
        regret["bandit"].append(best - worth[chosen])
        regret["predictor"].append(best - worth[there[int(alone.argmax())]])
        regret["random"].append(best - float(np.mean([worth[o] for o in there])))
        for operator in OPERATORS:
            stood_in = operator if operator in there else best_known(regret)
            regret[operator].append(best - worth[stood_in])
        for outcome in outcomes(world, pair, rows, chosen):
            bandit.add(f"peer-{step % 5}", outcome)
    found = {name: np.array(each) for name, each in regret.items()}
    totals = {operator: found[operator].sum() for operator in OPERATORS}
    return found | {"best_fixed": found[min(totals, key=totals.__getitem__)]}


def best_known(regret: dict[str, list[float]]) -> str:
    """Before there is a new operator, whoever waits for it has the one that has done best so far."""
    known = [operator for operator in OPERATORS if operator != NEW_OPERATOR]
    return min(known, key=lambda operator: sum(regret[operator]))


def drawn_pairs(world: World, rng: random.Random) -> list[int]:
    """Pairs in a random order, none twice in a half; those of the new task only from the middle on."""
    old = [i for i, tasks in enumerate(world.tasks) if NEW_TASK not in tasks]
    everything = list(range(len(world.pairs)))
    first = [rng.choice(old) for _ in range(LENGTH // 2)]
    return first + rng.sample(everything, LENGTH - LENGTH // 2)


def cells_of(world: World, pair: int) -> npt.NDArray[np.int64]:
    """The cells of a pair, in one order of its two."""
    return np.array([row for row, (of, _) in enumerate(world.rows) if of == pair])


def outcomes(world: World, pair: int, rows: npt.NDArray[np.int64], operator: str) -> list[Outcome]:
    """What is told of a merge: one record for each task."""
    a, b = world.pairs[pair]
    return [
        Outcome.of(
            pair=(world.experts[a].digest, world.experts[b].digest),
            operator=operator,
            plan=sha256(f"{a} {b} {operator}".encode()),
            task=world.rows[row][1],
            items=sha256(world.rows[row][1].encode()),
            values=world.cells.values[row],
            missing=world.cells.missing[row],
            names=NAMES,
            utility=float(world.cells.utility[row, OPERATORS.index(operator)]),
        )
        for row in rows
    ]


if __name__ == "__main__":
    main()
