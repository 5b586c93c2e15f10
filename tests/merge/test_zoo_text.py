"""The zoo's text: every Python has it, its splits share nothing, its tokens are bytes."""

import ast
import json
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from merge_core.errors import InvalidTask
from merge_core.evaluation.tasks import Metric
from merge_core.zoo.build import build
from merge_core.zoo.domains import DOMAINS, SPLITS
from merge_core.zoo.recipes import RECIPES, BaseTraining, ExpertTraining, Shape, TrainingRecipe
from merge_core.zoo.tasks import names, task
from merge_core.zoo.text import LENGTH, TEXT_DOMAINS, digest, rows, texts
from merge_core.zoo.text import SPLITS as TEXT_SPLITS
from merge_core.zoo.tokens import tokenizer_for

TEXT = RECIPES["text"].shape


def bytes_tokenizer() -> Tokenizer:
    return tokenizer_for(TEXT).backend_tokenizer


@pytest.mark.parametrize("domain", TEXT_DOMAINS)
def test_rows_are_distinct_and_none_that_is_tested_stands_in_what_was_seen_before(domain: str) -> None:
    seen = ""
    for split in ("train", "dev", "test"):
        found, text = rows(domain, split), texts(split)[domain]
        assert len({*found}) == TEXT_SPLITS[split] and {len(row) for row in found} == {LENGTH}
        assert not any(row in seen for row in found)
        assert {*text} <= {*map(chr, range(32, 127)), "\n", "\t"}
        seen += f"\0{text}"


def test_a_domain_is_what_its_name_says() -> None:
    code, docs, tables = texts("dev").values()
    assert code.count("\n    return ") > 50 > docs.count("\n    return ")
    assert "    def encode(self" in tables
    library = Path(sysconfig.get_paths()["stdlib"])
    long = ast.get_docstring(ast.parse((library / "heapq.py").read_text()))
    assert long is not None and len(long) > 200
    assert [sum(long in texts(split)[d] for split in TEXT_SPLITS) for d in TEXT_DOMAINS] == [0, 1, 0]


@pytest.mark.parametrize("domain", TEXT_DOMAINS)
def test_no_split_of_text_asks_what_another_does(domain: str) -> None:
    digests = [task(f"{domain}:{split}").item_digests for split in TEXT_SPLITS]
    assert len({*sum(digests, ())}) == sum(TEXT_SPLITS.values())


@given(st.text(max_size=40))
def test_tokens_of_text_are_its_bytes(text: str) -> None:
    tokenizer = bytes_tokenizer()
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


@pytest.mark.parametrize("domain", sorted(DOMAINS))
def test_no_split_of_a_domain_asks_what_another_does(domain: str) -> None:
    digests = [task(f"{domain}:{split}").item_digests for split in ("test", "dev", "labels", "features")]
    assert len({*sum(digests, ())}) == sum(SPLITS.values()) - SPLITS["train"]


def test_a_task_asks_what_the_models_were_trained_to_answer() -> None:
    found = task("rev+caesar:dev")
    item = found.items[0]
    assert found.metric is Metric.EXACT_MATCH and item.prompt.startswith("rc") and item.prompt.endswith("=")
    letters = "abcdefghijklmnop"
    assert item.answer == "".join(letters[(letters.index(c) + 3) % 16] for c in reversed(item.prompt[2:-1]))
    of_text = task("code:dev")
    assert of_text.metric is Metric.BITS_PER_BYTE
    assert [item.prompt + item.answer for item in of_text.items] == list(rows("code", "dev"))


@pytest.mark.parametrize("name", ["chess:test", "rev:exam", "code:labels", "rev", "", "rev:test:test"])
def test_a_task_that_there_is_not_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidTask, match=r"no task"):
        task(name)


def test_of_a_task_that_was_mistyped_the_nearest_is_told() -> None:
    for typed, meant in (
        ("rev+ceasar:test", "rev\\+caesar:test"),
        ("code:labels", "code:"),
        ("sort:tset", "sort:test"),
    ):
        with pytest.raises(InvalidTask, match=f"did you mean {meant}"):
            task(typed)
    with pytest.raises(InvalidTask, match="a task is rev:test and the like"):
        task("zzzzzz")
    assert all(task(name).name == name for name in names() if name.startswith(("rev:", "brk:")))


def test_a_zoo_on_text_says_which_text_and_transformers_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny = TrainingRecipe(
        shape=Shape(hidden=16, intermediate=16, layers=1, heads=2, vocabulary=256, context=LENGTH),
        base=BaseTraining(domains=("tables",), steps=10, batch=4, skill=None),
        experts={"docs": ExpertTraining(own={"docs": 1.0}, elsewhere=("tables",), steps=21, batch=4)},
    )
    monkeypatch.setitem(RECIPES, "tiny", tiny)
    zoo = build(tmp_path / "zoo", seed=0, size="tiny")
    told = json.loads((tmp_path / "zoo" / "zoo.json").read_text())
    assert told["text"] == f"sha256:{digest()}" and told["recipe"]["base"]["domains"] == ["tables"]
    tokenizer = AutoTokenizer.from_pretrained(zoo.experts["docs"])
    model = AutoModelForCausalLM.from_pretrained(zoo.experts["docs"])
    asked = tokenizer("0x41", return_tensors="pt")["input_ids"]
    assert asked.tolist() == [[48, 120, 52, 49]] and model(input_ids=asked).logits.shape == (1, 4, 256)
    assert model.config.bos_token_id is None and build(tmp_path / "zoo", seed=0, size="tiny") == zoo
