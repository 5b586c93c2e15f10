"""The sanity report: a merge that looks like its parents passes quietly, one that does not is named."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from merge_core import execute
from merge_core.checkpoint.writer import partial_path
from merge_core.digest import ModelId, sha256
from merge_core.errors import CorruptCheckpoint, MergeCoreError
from merge_core.norms import Norms
from merge_core.operators import COPY
from merge_core.plan import MergePlan, Operand, Step, TensorPlan
from merge_core.report import MAX_TEXT, Extreme, Reading, Report, read_text, report

NAMES = (
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight",
    "odd.ids",
)


def planned(*names: str, copied: tuple[str, ...] = ()) -> MergePlan:
    """A plan that adds two models, but for what it copies."""
    tensors = tuple(
        TensorPlan(
            name=name,
            dtype="F32",
            shape=(6,),
            operator=COPY.name if name in copied else "linear",
            operands=tuple(
                Operand(source=source, tensor=name) for source in range(1 if name in copied else 2)
            ),
            parameters={},
        )
        for name in names
    )
    inputs = (ModelId(sha256(b"a")), ModelId(sha256(b"b")))
    return MergePlan(inputs=inputs, steps=(Step(base=None, donor=0, architecture="X", tensors=tensors),))


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_a_ratio_is_the_merged_norm_in_means_of_what_was_merged() -> None:
    norms = Norms()
    for name in NAMES[:-1]:
        norms.observe(name, 0, (array(3, 0), array(0, 1)), array(0, 2))
    norms.observe(NAMES[3], 1, (array(4, 0), array(0, 0)), array(0, 0))  # now 5, 1 and 2: 2/3

    found = report(planned(*NAMES, copied=NAMES[-1:]), norms)

    assert (found.tensors, found.copied, found.measured, found.zeros) == (7, 1, 6, 0)
    assert [part.name for part in found.parts] == ["embedding", "layer 0", "layer 1", "norm", "head"]
    assert [part.ratio for part in found.parts] == [1.0, 1.0, 0.7845, 1.0, 1.0]  # √8 over √(3² + 2²)
    middle = found.parts[2]
    assert middle.smallest == Extreme(tensor=NAMES[3], ratio=0.6667)
    assert middle.largest == Extreme(tensor=NAMES[4], ratio=1.0)
    assert found.summary == ("norms of 6 tensors: 0.667 to 1 times their parents'", "nothing stands out")


def test_what_stands_out_is_named_in_a_sentence() -> None:
    norms = Norms()
    norms.observe(NAMES[0], 0, (array(1, 0), array(0, 1)), array(2.5, 0))
    norms.observe(NAMES[1], 0, (array(1, 0), array(0, 1)), array(0, 0))
    norms.observe(NAMES[2], 0, (array(1, 0), array(0, 1)), array(0, 0.499))
    norms.observe(NAMES[3], 0, (array(0, 0), array(0, 0)), array(0, 0))

    found = report(planned(*NAMES[:5]), norms)

    assert found.flags == (
        "lm_head.weight is 2.5 times as long as what it was made of",
        "model.embed_tokens.weight is all zero, and what it was made of is not",
        "model.layers.0.mlp.up_proj.weight is 0.499 times as long as what it was made of",
    )
    assert found.zeros == 2 and [part.name for part in found.parts] == ["embedding", "layer 0", "head"]
    assert "1 not measured" in found.summary[0] and "2 all zero" in found.summary[0]
    assert found.summary[1] == f"{found.flags[0]} (and 2 more)"


def test_a_thousand_flags_are_counted_and_not_listed() -> None:
    names = sorted(f"model.layers.{index}.w" for index in range(1000))
    norms = Norms()
    for name in names:
        norms.observe(name, 0, (array(1), array(1)), array(9))
    found = report(planned(*names), norms)
    assert len(found.flags) == 21 and found.flags[-1] == "980 tensors more stand out like these"
    assert [part.name for part in found.parts] == [f"layer {index}" for index in range(1000)]


def test_what_was_not_observed_or_overflows_is_not_measured() -> None:
    norms = Norms()
    norms.observe(NAMES[0], 0, (array(1e30), array(1)), array(1e30))
    found = report(planned(*NAMES[:2]), norms)
    assert (found.measured, found.parts, found.flags) == (0, (), ())
    assert found.summary == ("norms of 0 tensors, 2 not measured", "nothing stands out")


def test_the_order_of_threads_does_not_show() -> None:
    """After a large square many small ones vanish that together would show before it."""
    pieces = [array(2.0**27), *[array(1)] * 64]

    def observed(order: list[int], threads: int) -> dict[str, tuple[float, ...]]:
        norms = Norms()
        with ThreadPoolExecutor(threads) as pool:
            for future in [
                pool.submit(norms.observe, NAMES[0], i, pieces[i : i + 1], pieces[i]) for i in order
            ]:
                future.result()
        return norms.taken()

    assert (
        observed(list(range(65)), 1)
        == observed(list(reversed(range(65))), 4)
        == {NAMES[0]: (2.0**27, 2.0**27)}
    )


def test_a_report_survives_its_file_and_a_damaged_one_is_refused() -> None:
    norms = Norms()
    norms.observe(NAMES[0], 0, (array(1, 0), array(0, 1)), array(2.5, 0))
    reading = Reading(model="merged", bits_per_byte=1.25, perplexity=3.5, tokens=10)
    found = dataclasses.replace(report(planned(*NAMES), norms), text="notes.txt", readings=(reading,))
    data = found.to_bytes()
    assert Report.parse(data) == found
    for before, after in (
        (b'"version": 1', b'"version": 2'),
        (b'"copied": 0', b'"copied": -1'),
        (b'"ratio": 2.5', b'"ratio": "x"'),
        (b'"text": "notes.txt"', b'"text": []'),
        (b'"tokens": 10', b'"tokens": "x"'),
        (b'"flags"', b'"flag"'),
        (
            b"{",
            b"[",
        ),
        (b"}", b""),
    ):
        assert before in data
        with pytest.raises(CorruptCheckpoint, match="not a sanity report"):
            Report.parse(data.replace(before, after, 1))


@pytest.mark.parametrize("data", [b"", b" \n", b"\xff\xfe\x00", b"x" * (MAX_TEXT + 1)])
def test_a_text_is_utf8_of_bounded_size(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(data)
    with pytest.raises(MergeCoreError):
        read_text(tmp_path / "text")
    (tmp_path / "text").write_bytes("Ünïcödé\n".encode())
    assert read_text(tmp_path / "text") == "Ünïcödé\n"


METHODS = {
    "linear": "merge_method: linear\nmodels:\n",
    "ties": "merge_method: ties\nbase_model: BASE\nparameters: {density: 0.5}\nmodels:\n",
    "della": "merge_method: della\nbase_model: BASE\nparameters: {density: 0.5, epsilon: 0.1}\nmodels:\n",
}


@pytest.fixture
def run(
    save: Callable[..., Path],
    weights: Callable[..., torch.Tensor],
    sealed: Callable[..., tuple[MergePlan, list[execute.Material]]],
    tmp_path: Path,
) -> Callable[..., MergePlan]:
    """`run("ties", norms)`: merge three models of which one tensor has several pieces, cut within rows."""
    shapes = {"model.layers.0.w": (1100, 1003), "model.layers.1.w": (40, 9), "model.norm.weight": (7,)}

    def merge(method: str, norms: Norms, **options: object) -> MergePlan:
        paths = [tmp_path / method / name for name in ("base", "math", "code")]
        for path in paths:
            if not path.exists():
                drawn = {n: weights(f"{path.name} {n}", *s, dtype=torch.bfloat16) for n, s in shapes.items()}
                save(f"{method}/{path.name}", drawn | {"ids": torch.arange(3)})
        text = METHODS[method].replace("BASE", str(paths[0]))
        listed = paths[1:] if "base_model" in text else paths
        text += "".join(f"  - {{model: {path}, parameters: {{weight: 0.7}}}}\n" for path in listed)
        plan, inputs = sealed(text)
        target = tmp_path / method / "out"
        journal = target.with_suffix(".journal")
        execute.run(plan, inputs, target, journal=journal, norms=norms, **options)  # type: ignore[arg-type]
        return plan

    return merge


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_is_seen_element_by_element_and_only_once(
    method: str, run: Callable[..., MergePlan], tmp_path: Path
) -> None:
    norms = Norms()
    plan = run(method, norms, threads=3)
    files = [tmp_path / method / name / "model.safetensors" for name in ("base", "math", "code")]
    files.append(partial_path(tmp_path / method / "out") / "model.safetensors")
    *models, merged = [load_file(path) for path in files]
    taken = norms.taken()
    assert taken.keys() == merged.keys() - {"ids"}
    for name, (own, *operands) in taken.items():
        assert own == pytest.approx(float(merged[name].double().norm()), rel=4e-3), (
            name
        )  # before its rounding
        assert operands == pytest.approx([float(model[name].double().norm()) for model in models], rel=1e-5)
    found = report(plan, norms)
    assert (found.tensors, found.copied, found.measured) == (4, 1, 3)


def test_a_merge_that_was_interrupted_is_reported_as_one_that_was_not(
    run: Callable[..., MergePlan], tmp_path: Path
) -> None:
    class KilledError(Exception):
        """Stands for the end of the process."""

    done: list[int] = []

    def progress(count: int) -> None:
        done.append(count)
        if len(done) == 2:
            raise KilledError

    with pytest.raises(KilledError):
        run("linear", Norms(), on_progress=progress)
    resumed, undisturbed = Norms(), Norms()
    found = report(run("linear", resumed), resumed)
    shutil.rmtree(partial_path(tmp_path / "linear" / "out"))
    assert found == report(run("linear", undisturbed), undisturbed)
    assert resumed.taken() == undisturbed.taken()
    assert (found.tensors, found.copied, found.measured) == (4, 1, 3)
