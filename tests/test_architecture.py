"""The house rules: who may import whom, as a table that is read from the source with `ast`."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GENERATED = ("_pb2.py", "_pb2_grpc.py", "_pb2.pyi")

# A word, and the only places that may import it (path prefixes).
HOMES = {
    "torch": (
        "merge_core/operators/",
        "merge_core/zoo/",
        "merge_core/evaluation/",
        "merge_core/evolution/candidates.py",
        "merge_core/evolution/evaluator.py",
        "merge_core/simmerge/functional/probing.py",
        "merge_core/simmerge/choosing/training.py",
        "node/worker/evaluation.py",
        "node/worker/evolution.py",
    ),
    "transformers": ("merge_core/zoo/", "merge_core/evaluation/"),
    "tokenizers": ("merge_core/zoo/", "merge_core/evaluation/", "merge_core/simmerge/functional/probing.py"),
    "cma": ("merge_core/evolution/search.py",),
    "libp2p": ("node/network/libp2p/",),
    "trio": ("node/network/libp2p/",),
    "multiaddr": ("node/network/libp2p/",),
    "grpc": ("node/control/", "node/peer/", "node/wire/v1/"),
    "cryptography": ("node/identity/",),
    "node.wire.v1": ("node/wire/", "node/control/", "node/peer/"),
    "sqlite3": ("node/store.py",),
    "typer": ("node/cli/",),
    "pickle": (),
    "marshal": (),
    "shelve": (),
}

# A folder, and what nothing inside it may import.
FORBIDDEN = {
    "merge_core/": ("node",),
    "merge_core/checkpoint/": ("torch", "transformers", "random", "time"),
    "node/domain/": ("time", "random", "secrets", "socket", "sqlite3", "asyncio", "anyio"),
    "node/identity/": ("node.provenance", "node.catalog", "node.negotiation", "node.network"),
    "node/network/": ("node.catalog", "node.negotiation", "node.exchange", "node.merging"),
    "node/exchange/": ("node.catalog", "node.negotiation", "node.merging", "node.control"),
    "node/negotiation/": ("node.exchange", "node.merging", "node.control"),
    "node/catalog/": ("node.exchange", "node.merging", "node.control"),
    "node/records/": (
        "node.catalog",
        "node.negotiation",
        "node.exchange",
        "node.merging",
        "node.provenance",
        "node.selection",
        "node.control",
    ),
    "node/selection/": ("node.exchange", "node.negotiation", "node.peer", "node.control"),
    "node/merging/": ("node.selection", "node.control"),
    "node/provenance/": ("node.catalog", "node.merging", "node.selection", "node.network"),
    "node/peer/": ("node.catalog", "node.negotiation", "node.exchange", "node.merging", "node.control"),
    "node/cli/": ("torch", "libp2p", "transformers", "merge_core.execute", "merge_core.zoo"),
}

DECLARATIVE = [
    "merge_core.recipe",
    "merge_core.plan",
    "merge_core.trace",
    "merge_core.resolve",
    "merge_core.memory",
    "merge_core.report",
    "merge_core.evaluation.named",
    "merge_core.evaluation.tasks",
    "merge_core.evolution.record",
    "merge_core.evolution.run",
    "merge_core.journal",
    "merge_core.functional",
    "merge_core.simmerge.index",
    "merge_core.simmerge.structural.sketcher",
    "merge_core.simmerge.pairs.survey",
    "merge_core.simmerge.pairs.features",
    "merge_core.simmerge.choosing.plans",
    "merge_core.simmerge.choosing.bandit",
    "merge_core.tokenizer.resolve",
    "merge_core.operators",
    "merge_core.checkpoint.reader",
    "merge_core.checkpoint.writer",
    "node.app",
    "node.cli.main",
]


def sources() -> list[Path]:
    """Every module of the two packages that a person wrote."""
    found = [p for top in ("node", "merge_core") for p in sorted((ROOT / top).rglob("*.py"))]
    return [p for p in found if not p.name.endswith(GENERATED)]


def imports(path: Path) -> Iterator[str]:
    """What a module imports when it runs: `if TYPE_CHECKING:` does not count."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("word", HOMES)
def test_a_dependency_is_imported_only_where_it_lives(word: str) -> None:
    strangers = [
        str(path.relative_to(ROOT))
        for path in sources()
        if any(within(name, word) for name in imports(path))
        and not str(path.relative_to(ROOT)).startswith(HOMES[word])
    ]
    assert not strangers, f"{word} is imported outside {HOMES[word]}"


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_room_does_not_reach_into_rooms_above_it(folder: str) -> None:
    reaches = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources()
        if str(path.relative_to(ROOT)).startswith(folder)
        for name in imports(path)
        if any(within(name, package) for package in FORBIDDEN[folder])
    ]
    assert not reaches


def test_every_module_says_what_it_is() -> None:
    silent = [str(p.relative_to(ROOT)) for p in sources() if not ast.get_docstring(ast.parse(p.read_text()))]
    assert not silent


def test_no_function_is_longer_than_a_screen_and_a_half() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= 80
    ]
    assert not long


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    names = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in sources()
    }
    edges = {name: {_module(i, names) for i in imports(path)} - {None, name} for name, path in names.items()}
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in done:
            for target in edges[name]:
                if target is not None and not name.startswith(target + "."):
                    walk(target, (*trail, name))
            done.add(name)

    for name in names:
        walk(name, ())


def _module(name: str, known: dict[str, Path]) -> str | None:
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


@pytest.mark.parametrize("module", DECLARATIVE)
def test_what_the_command_line_loads_brings_neither_torch_nor_numba_nor_libp2p(module: str) -> None:
    heavy = "('torch', 'numba', 'libp2p', 'trio', 'transformers', 'tokenizers')"
    script = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_tests_hold_no_package_that_could_shadow_ours() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_node_is_ours() -> None:
    import node

    assert Path(node.__file__).parent == ROOT / "node" or "site-packages" in node.__file__
    assert "peer" in (node.__doc__ or "")
