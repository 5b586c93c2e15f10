"""Probe sets: built in or from a file, read strictly, without answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_core.errors import InvalidTask
from merge_core.simmerge.functional import probes
from merge_core.simmerge.functional.probes import Probe, ProbeSet


def test_a_set_is_read_as_it_was_written_whatever_it_is_called() -> None:
    made = ProbeSet(
        name="mine",
        probes=(Probe(task="maths", prompt="1+1", text="=é"), Probe(task="b", prompt="", text="x")),
    )
    read = probes.parse("other", [*made.lines(), "", "  "])
    assert read.probes == made.probes and read.digest == made.digest and read.tasks == ("maths", "b")
    swapped = ProbeSet(name="mine", probes=made.probes[::-1])
    assert swapped.digest != made.digest


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '{"task": "a", "text": "b"}',
        '{"task": "a", "prompt": "", "text": "b", "answer": "c"}',
        '{"task": "a", "prompt": "", "text": ""}',
        '{"task": "a", "prompt": 1, "text": "b"}',
        '{"task": "", "prompt": "", "text": "b"}',
        '{"task": "a\\u0000", "prompt": "", "text": "b"}',
        '{"task": "a", "prompt": "", "text": "\\ud800"}',
        '{"task": "a", "task": "a", "prompt": "", "text": "b"}',
        '{"task": "a", "prompt": "", "text": "' + "b" * 4097 + '"}',
        "[" * 100_000,
    ],
)
def test_a_line_that_is_no_probe_is_refused_by_its_number(line: str) -> None:
    with pytest.raises(InvalidTask, match="line 2"):
        probes.parse("x", ['{"task": "a", "prompt": "", "text": "b"}', line])


def test_a_set_is_bounded_and_never_empty() -> None:
    line = '{"task": "a", "prompt": "", "text": "b"}'
    with pytest.raises(InvalidTask, match="0 probes"):
        probes.parse("x", [""])
    with pytest.raises(InvalidTask, match="line 513"):
        probes.parse("x", [line] * 513)
    with pytest.raises(InvalidTask, match="65 tasks"):
        probes.parse("x", [line.replace('"a"', f'"a{n}"') for n in range(65)])


def test_names_are_those_of_built_in_sets_and_of_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidTask, match="no probe set") as refused:
        probes.find("generals")
    assert "general" in refused.value.hint
    with pytest.raises(InvalidTask, match="cannot be read"):
        probes.find(str(tmp_path / "none.jsonl"))
    (tmp_path / "own.jsonl").write_text('{"task": "a", "prompt": "", "text": "b"}\n')
    assert probes.find(str(tmp_path / "own.jsonl")).name == "own.jsonl"


def test_the_zoo_set_is_the_one_that_the_zoo_makes_and_tells_no_answers() -> None:
    from merge_core.zoo.domains import DOMAINS, items
    from merge_core.zoo.probes import made

    found = probes.find("zoo")
    assert found.digest == made().digest
    assert sum(len(probe.text) for probe in found.probes) == 510 and len(found.tasks) == 5
    for probe in found.probes:
        domain = DOMAINS[probe.task]
        item = next(i for i in items(domain, "features") if domain.question(i) == probe.prompt)
        assert probe.text == item.prompt[:6]


def test_the_general_set_is_many_kinds_of_text_that_reach_512_tokens() -> None:
    found = probes.find("general")
    texts = [probe.text for probe in found.probes]
    assert {"maths", "code", "law", "medicine", "dialogue"} < set(found.tasks) and len(found.tasks) >= 10
    assert len(set(texts)) == len(texts) and not any(probe.prompt for probe in found.probes)
    # Seven characters a token is more than tokenizers of today reach on such text.
    assert 512 * 7 < sum(map(len, texts)) < 6000
