"""Tasks: what a line means, what is refused and where, and digests that name content alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_core.errors import InvalidTask
from merge_core.evaluation import tasks
from merge_core.evaluation.tasks import Item, Metric, Task, parse, read

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
FILLED = TEXTS.filter(bool)


@st.composite
def items(draw: st.DrawFn, metric: Metric) -> Item:
    """An item that a metric can score."""
    prompt = draw(TEXTS if metric is Metric.BITS_PER_BYTE else FILLED)
    if metric is not Metric.CHOICE:
        return Item(prompt=prompt, answer=draw(FILLED))
    choices = draw(st.lists(FILLED, min_size=2, max_size=5, unique=True))
    return Item(prompt=prompt, answer=draw(st.sampled_from(choices)), choices=tuple(choices))


@st.composite
def whole(draw: st.DrawFn) -> Task:
    """A task of any metric."""
    metric = draw(st.sampled_from(Metric))
    found = draw(st.lists(items(metric), min_size=1, max_size=4))
    return Task(name="drawn", metric=metric, items=tuple(found))


@given(whole())
def test_what_is_written_is_read_again(task: Task) -> None:
    assert parse("drawn", task.lines()) == task
    assert parse("drawn", task.lines()).digest == task.digest


@given(st.lists(st.text(max_size=60), max_size=4))
def test_any_lines_are_a_task_or_refused_by_name(lines: list[str]) -> None:
    try:
        parse("anything", lines)
    except InvalidTask as error:
        assert error.why.startswith("anything")


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["prompt", "answer", "choices", "text", "metric", "id"]), JSON))
def test_values_of_any_kind_are_a_task_or_refused_by_line(value: dict[str, object]) -> None:
    try:
        task = parse("anything", [json.dumps(value)])
    except InvalidTask as error:
        assert error.why.startswith("anything, line 1: ")
    else:
        assert parse("anything", task.lines()) == task


def test_a_line_says_by_its_shape_what_is_measured() -> None:
    asked = parse("sums", ['{"prompt": "2+2=", "answer": "4"}', "", '{"prompt": "1+1=", "answer": "2"}'])
    assert asked.metric is Metric.EXACT_MATCH
    assert asked.items == (Item(prompt="2+2=", answer="4"), Item(prompt="1+1=", answer="2"))
    chosen = parse("sums", ['{"prompt": "2+2 is", "answer": " 4", "choices": [" 3", " 4"]}'])
    assert chosen.metric is Metric.CHOICE and chosen.items[0].choices == (" 3", " 4")
    told = parse("tale", ['{"text": "Once upon a time"}'])
    assert told.metric is Metric.BITS_PER_BYTE
    assert told.items == (Item(prompt="", answer="Once upon a time"),)


def test_a_line_may_ask_how_well_an_answer_is_predicted() -> None:
    task = parse("sums", ['{"prompt": "2+2=", "answer": "4", "metric": "bits_per_byte"}'])
    assert task.metric is Metric.BITS_PER_BYTE and task.items == (Item(prompt="2+2=", answer="4"),)


def test_the_lines_that_the_readme_shows_are_lines_of_tasks() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = readme.split("## Measure")[1].split("```json\n")[1].split("```")[0]
    metrics = [parse("shown", [line]).metric for line in shown.splitlines()]
    assert metrics == [Metric.EXACT_MATCH, Metric.CHOICE, Metric.BITS_PER_BYTE]


GOOD = '{"prompt": "2+2=", "answer": "4"}'


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 2"),
        ("[]", "not an object"),
        ('"2+2="', "not an object"),
        ("[" * 100_000, "line 2"),
        ('{"prompt": "2+2="}', "neither prompt and answer nor text"),
        ('{"prompt": "2+2=", "answer": 4}', "answer is not text"),
        ('{"prompt": "2+2=", "answer": ""}', "answer is empty"),
        ('{"prompt": "", "answer": "4"}', "prompt is empty"),
        ('{"prompt": "2+2=", "answer": "4", "id": 7}', "'id' is not a key"),
        ('{"prompt": "2+2=", "answer": "4", "text": "4"}', "neither prompt and answer nor text"),
        ('{"prompt": "2+2=", "answer": "4", "answer": "5"}', "a key is repeated"),
        ('{"prompt": "2+2=", "answer": "4", "metric": "bleu"}', "no metric 'bleu'; one of exact_match"),
        ('{"prompt": "2+2=", "answer": "4", "metric": ["choice"]}', "no metric"),
        ('{"prompt": "2+2=", "answer": "4", "metric": "choice"}', "choice after lines of exact_match"),
        ('{"prompt": "2+2=", "answer": "4", "choices": ["4", "5"]}', "choice after lines of exact_match"),
        ('{"text": "four"}', "bits_per_byte after lines of exact_match"),
        ('{"text": "four", "metric": "exact_match"}', "prompt is empty"),
        ('{"prompt": "2+2=", "answer": "\\ud800"}', "surrogate"),
        ('{"prompt": "2+2=", "answer": "' + "4" * (1 << 20) + '4"}', "at most 1048576 characters"),
        ('{"text": "' + "4" * (4 << 20) + '"}', "at most 4194304 are read"),
    ],
)
def test_a_line_that_cannot_be_scored_is_named(line: str, why: str) -> None:
    with pytest.raises(InvalidTask, match=r"sums, line 2") as caught:
        parse("sums", [GOOD, line])
    assert why in caught.value.why and caught.value.hint


@pytest.mark.parametrize("choices", [[], ["4"], ["4", "4"], ["4", ""], ["5", "6"], ["4", 5], [4] * 65])
def test_choices_are_two_or_more_different_texts_with_the_answer_among_them(choices: list[object]) -> None:
    with pytest.raises(InvalidTask, match="line 1"):
        parse("sums", [json.dumps({"prompt": "2+2=", "answer": "4", "choices": choices})])


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n" + '{"prompt": "ü\u2028?", "answer": "4"}'.encode()
    )
    task = read(path)
    assert (task.name, task.metric) == ("sums.jsonl", Metric.EXACT_MATCH)
    assert [item.prompt for item in task.items] == ["2+2=", "ü\u2028?"]


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xff\xfe", None])
def test_a_file_without_items_is_no_task(data: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InvalidTask, match=r"sums\.jsonl"):
        read(path)


def test_more_items_than_are_scored_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "MAX_ITEMS", 3)
    assert len(parse("sums", [GOOD] * 3).items) == 3
    with pytest.raises(InvalidTask, match="line 4: more than 3 items"):
        parse("sums", [GOOD] * 4)


def test_a_file_larger_than_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "MAX_FILE", 40)
    (tmp_path / "sums.jsonl").write_text(GOOD + "\n" + GOOD)
    with pytest.raises(InvalidTask, match="more than 40 bytes"):
        read(tmp_path / "sums.jsonl")


def test_the_digest_is_that_of_metric_and_items_and_of_nothing_else() -> None:
    task = parse("sums", [GOOD, '{"prompt": "1+1=", "answer": "2"}'])
    assert replace(task, name="other").digest == task.digest
    assert task.digest == "sha256:0f33417f8ad0a1f408018105bbf892555e7f135f342dcbcac6274d8c6eb92801"
    others = [
        replace(task, items=task.items[::-1]),
        task.first(1),
        replace(task, metric=Metric.BITS_PER_BYTE),
        replace(task, items=(task.items[0], replace(task.items[1], answer="3"))),
    ]
    assert len({task.digest, *(other.digest for other in others)}) == 5


def test_an_item_is_the_same_whatever_wrong_choices_stand_beside_it() -> None:
    asked = Item(prompt="2+2=", answer="4")
    assert replace(asked, choices=("4", "5")).digest == asked.digest
    assert replace(asked, answer="5").digest != asked.digest
    assert Item(prompt="2+", answer="2=4").digest != asked.digest
    task = parse("sums", [GOOD])
    assert task.item_digests == (asked.digest,)
