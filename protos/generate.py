"""Generate node/wire/v1 from the .proto files beside this script; `--check` says whether it is up to date.

The generated modules are checked in: a file that only a build makes is silently missing from some wheel.
protoc derives imports from the path below its root, so the .proto files lie where the modules belong;
their package, the name on the wire, stays weft.v1.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
ROOT = PROTOS.parent
PACKAGE = Path("node/wire/v1")


def generate(into: Path) -> None:
    """Write the generated modules below `into`; raises SystemExit when protoc finds a fault."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / PACKAGE).glob("*.proto"))
    well_known = str(resources.files("grpc_tools") / "_proto")
    status = protoc.main(
        ["protoc", f"-I{PROTOS}", f"-I{well_known}"]
        + [f"--{kind}_out={into}" for kind in ("python", "pyi", "grpc_python")]
        + sources
    )
    if status:
        raise SystemExit(f"protoc ended with {status}")


def generated(root: Path) -> dict[str, bytes]:
    """The generated modules below `root` by file name."""
    return {path.name: path.read_bytes() for path in (root / PACKAGE).glob("*_pb2*.py*")}


def stale() -> list[str]:
    """Names of checked-in modules that differ from what the .proto files give, or that none of them gives."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh, present = generated(Path(folder)), generated(ROOT)
    return sorted(name for name in fresh | present if fresh.get(name) != present.get(name))


def main() -> int:
    """Generate, or with --check compare."""
    if sys.argv[1:] == ["--check"]:
        names = stale()
        if names:
            print(f"not what the .proto files give: {', '.join(names)}; run: make protos", file=sys.stderr)
        return 1 if names else 0
    for name in stale():
        (ROOT / PACKAGE / name).unlink(missing_ok=True)
    generate(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
