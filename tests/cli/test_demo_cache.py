"""Where the demo keeps what it trains: apart by whatever it follows from, told without loading torch."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from merge_core.zoo import recipes
from node import app


def test_models_of_another_torch_version_or_recipe_lie_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    here = app.zoo_folder(0)
    assert here == app.zoo_folder(0) != app.zoo_folder(1)
    real = metadata.version
    with monkeypatch.context() as upgraded:
        upgraded.setattr(metadata, "version", lambda name: "99.0" if name == "torch" else real(name))
        assert app.zoo_folder(0) != here
    with monkeypatch.context() as changed:
        changed.setattr(recipes, "_VERSION", recipes._VERSION + 1)
        assert app.zoo_folder(0) != here
    monkeypatch.setitem(recipes.RECIPES, "demo", recipes.RECIPES["fixture"])
    assert app.zoo_folder(0) != here


def test_to_know_where_loads_no_torch() -> None:
    script = "import sys; from node import app; app.zoo_folder(0); print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
