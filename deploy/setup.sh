#!/usr/bin/env bash
# Set up .venv with everything that weft needs, once. Called by every make target.
#
# fastecdsa (a dependency of libp2p) has no Linux wheel: it compiles, and needs a C compiler and the GMP headers.
# As root on a Debian-like system what is missing is installed; otherwise the command to run is printed.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

missing=()
command -v cc >/dev/null || command -v gcc >/dev/null || missing+=(gcc)
header_found() { echo "#include <$1>" | "${CC:-cc}" -E - >/dev/null 2>&1; }
header_found gmp.h || missing+=(libgmp-dev)
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
[ -e "$include/Python.h" ] || missing+=(python3-dev)

if [ ${#missing[@]} -gt 0 ]; then
    install="apt-get install -y ${missing[*]}"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "weft: installing ${missing[*]}" >&2
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive $install -qq >/dev/null
    else
        echo "weft: missing system packages: ${missing[*]}" >&2
        echo "weft: run: sudo $install   (elsewhere: a C compiler, the GMP headers and the Python headers)" >&2
        exit 1
    fi
fi

[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
echo "weft: installing the Python packages into .venv" >&2
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
