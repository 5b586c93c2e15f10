"""Tokenizers and chat templates without weights: reading, joining, choosing, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from merge_core.checkpoint.source import TensorInfo
from merge_core.errors import CorruptCheckpoint, MergeCoreError, Unmergeable
from merge_core.tokenizer import choice as choices
from merge_core.tokenizer import templates
from merge_core.tokenizer.choice import TokenizerChoice
from merge_core.tokenizer.plan import FromToken, Rule, TokenizerPlan
from merge_core.tokenizer.resolve import Settled, config_changes, settle, token_tensors
from merge_core.tokenizer.union import Tokenizers
from merge_core.tokenizer.vocabulary import read_vocabulary

Files = dict[str, bytes]
Train = Callable[..., Files]

ENGLISH = "the cat sat on the mat and the other cat ran to the hat\nwhat the cat ate"
CODE = "def main ( ) : return the_cat\nfor cat in range ( ten ) : print ( cat )"
KINDS = ["BPE", "WordPiece", "Unigram"]


def with_rows(files: Files, rows: int | None = None, **config: object) -> Files:
    """The files of a model whose config states a number of rows: as many as tokens unless told otherwise."""
    count = Tokenizer.from_str(files["tokenizer.json"].decode()).get_vocab_size() if rows is None else rows
    return {**files, "config.json": json.dumps({"vocab_size": count, **config}).encode()}


def settled(told: dict[str, Any], *models: Files, base: int | None = 0) -> tuple[Settled, Tokenizers]:
    """A choice over models called m0, m1 and so on."""
    choice = choices.read(told, pytest.fail, lambda where, value: str(value))
    assert choice is not None
    files = [lambda given=given: given for given in models]  # type: ignore[misc]
    found = settle(choice, {f"m{n}": n for n in range(len(models))}, base, files)
    return found, Tokenizers(found.plan, files)


def library(files: Files) -> Tokenizer:
    return Tokenizer.from_str(files["tokenizer.json"].decode())


# -- reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_is_what_the_library_reads(kind: str, train: Train) -> None:
    files = train(kind, ENGLISH, 60, "<unk>", "<s>", added=("<tool>", "<call>"))
    vocabulary = read_vocabulary(files)
    theirs = library(files).get_vocab()
    assert vocabulary.ids == theirs and list(vocabulary.ids.values()) == sorted(theirs.values())
    assert [token.content for token in vocabulary.added] == ["<unk>", "<s>", "<tool>", "<call>"]
    assert [token.special for token in vocabulary.added] == [True, True, False, False]


def test_older_files_are_read_too() -> None:
    pairs = {"vocab.json": b'{"b": 1, "a": 0}', "merges.txt": b"", "added_tokens.json": b'{"<x>": 2}'}
    assert read_vocabulary(pairs).ids == {"a": 0, "b": 1, "<x>": 2}
    assert read_vocabulary({"vocab.txt": "[UNK]\r\nthe\n\u2028\n".encode()}).ids == {
        "[UNK]": 0,
        "the": 1,
        "\u2028": 2,
    }


def test_what_the_config_of_a_tokenizer_adds_counts(train: Train) -> None:
    files = train("BPE", ENGLISH, 60, "<s>")
    size = len(read_vocabulary(files).ids)
    config = {
        "added_tokens_decoder": {"0": {"content": "<s>"}, str(size): {"content": "<new>", "lstrip": True}}
    }
    files["tokenizer_config.json"] = json.dumps(config).encode()
    vocabulary = read_vocabulary(files)
    assert vocabulary.ids["<new>"] == size
    assert vocabulary.added[-1].lstrip


def test_a_sentencepiece_model_alone_is_refused_by_name() -> None:
    with pytest.raises(Unmergeable, match=r"tokenizer\.model alone") as caught:
        read_vocabulary({"tokenizer.model": b"\x0a"})
    assert "save_pretrained" in caught.value.hint


def document(vocabulary: Any = None, added: Any = (), **model: Any) -> bytes:
    named = {"a": 0, "b": 1} if vocabulary is None else vocabulary
    return json.dumps({"added_tokens": added, "model": {"vocab": named, "type": "BPE", **model}}).encode()


def token(content: Any, number: Any, **flags: Any) -> dict[str, Any]:
    return {"content": content, "id": number, **flags}


HOSTILE = {
    "nothing": b"",
    "no object": b"[]",
    "no model": b"{}",
    "model is a text": b'{"model": "x"}',
    "deep": b'{"model":' * 100_000,
    "wide": b'{"model": [' + b"[]," * (1 << 22) + b"[]]}",
    "not unicode": b"\xff{}",
    "not a number": document({"a": "0"}),
    "a fraction": document({"a": 0.5}),
    "true is no id": document({"a": True}),
    "negative": document({"a": -1}),
    "huge": document({"a": 1 << 40}),
    "two tokens with one id": document({"a": 0, "b": 0}),
    "a token twice": b'{"model": {"vocab": {"a": 0, "a": 1}}}',
    "a piece twice": document([["a", 0.0], ["a", -1.0]]),
    "a piece without text": document([[None, 0.0]]),
    "pieces without scores and texts": document([[]]),
    "a number for pieces": document(7),
    "long": document({"a" * 5000: 0}),
    "added with another id": document(added=[token("<x>", 9)]),
    "added with the id of another": document({"a": 0, "b": 2}, added=[token("<x>", 2)]),
    "added over a token": document(added=[token("b", 0)]),
    "added without an id": document(added=[{"content": "<x>"}]),
    "added without a text": document(added=[token(None, 2)]),
    "added with a flag of text": document(added=[token("<x>", 2, lstrip="yes")]),
    "added is a mapping": document(added={}),
    "nan": b'{"model": {"vocab": {}, "dropout": NaN}}',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tokenizers_are_refused(case: str) -> None:
    with pytest.raises(CorruptCheckpoint):
        read_vocabulary({"tokenizer.json": HOSTILE[case]})


@pytest.mark.parametrize(
    "decoder",
    [[], {"-1": {"content": "x"}}, {"9" * 30: {"content": "x"}}, {"2": "x"}, {"7": {"content": "x"}}],
)
def test_hostile_configs_of_tokenizers_are_refused(decoder: Any) -> None:
    config = json.dumps({"added_tokens_decoder": decoder or [1]}).encode()
    with pytest.raises(CorruptCheckpoint):
        read_vocabulary({"tokenizer.json": document(), "tokenizer_config.json": config})


# -- joining -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_union_keeps_the_ids_of_the_first_and_appends_the_others(kind: str, train: Train) -> None:
    first = with_rows(train(kind, ENGLISH, 60, "<unk>", "<s>", added=("<tool>",)))
    other = with_rows(train(kind, CODE, 70, "<unk>", "<pad>", added=("<code>", "<tool>")))
    found, tokenizers = settled({"tokenizer_source": "union"}, first, other)
    ours, theirs = library(first).get_vocab(), library(other).get_vocab()
    joined = tokenizers.vocabulary.ids
    assert joined.keys() == ours.keys() | theirs.keys() and len(joined) == found.plan.rows
    assert {t: joined[t] for t in ours} == ours
    new = [t for t in joined if t not in ours]
    assert [joined[t] for t in new] == list(range(len(ours), len(joined)))
    plain = sorted(
        (t for t in theirs if t not in ours and t not in ("<pad>", "<code>")), key=theirs.__getitem__
    )
    assert new == [*plain, "<pad>", "<code>"]
    assert library(dict(tokenizers.files)).get_vocab() == joined
    assert read_vocabulary(tokenizers.files).ids == joined


def test_the_files_of_a_union_are_the_same_bytes_every_time(train: Train) -> None:
    models = [with_rows(train("BPE", text, 60, "<s>")) for text in (ENGLISH, CODE)]
    runs = [settled({"tokenizer_source": "union"}, *models)[1].files for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_union_of_equal_tokenizers_leaves_the_files_alone(train: Train) -> None:
    files = with_rows(train("BPE", ENGLISH, 60, "<s>")) | {
        "merges.txt": b"x",
        "chat_template.jinja": b"{{ 1 }}",
    }
    _, tokenizers = settled({"tokenizer_source": "union"}, files, dict(files))
    assert tokenizers.files == {name: data for name, data in files.items() if name != "config.json"}


def test_files_that_would_still_hold_the_old_tokens_go(train: Train) -> None:
    first = with_rows(train("BPE", ENGLISH, 60, "<s>")) | {"vocab.json": b"{}", "merges.txt": b""}
    _, tokenizers = settled({"tokenizer_source": "union"}, first, with_rows(train("BPE", CODE, 60, "<s>")))
    assert sorted(tokenizers.files) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_list_of_added_tokens_in_the_config_is_kept_complete(train: Train) -> None:
    decoder = {"0": {"content": "<s>", "special": True}}
    first = with_rows(train("BPE", ENGLISH, 60, "<s>", added_tokens_decoder=decoder))
    other = with_rows(train("BPE", ENGLISH, 60, "<s>", "<pad>"))
    _, tokenizers = settled({"tokenizer_source": "union"}, first, other)
    listed = json.loads(tokenizers.files["tokenizer_config.json"])["added_tokens_decoder"]
    assert {v["content"] for v in listed.values()} == {"<s>", "<pad>"}
    assert listed[str(tokenizers.vocabulary.ids["<pad>"])]["special"]


def test_tokens_without_a_row_are_left_out(train: Train) -> None:
    full = train("BPE", ENGLISH, 60, "<s>", added=("<x>",))
    size = len(read_vocabulary(full).ids)
    found, tokenizers = settled({"tokenizer_source": "base"}, with_rows(full, size - 3))
    assert found.plan.rows == size - 3
    kept = library(dict(tokenizers.files))
    assert kept.get_vocab_size() == size - 3 and kept.token_to_id("<x>") is None
    assert kept.encode("the cat").tokens


def test_only_bpe_can_lose_tokens(train: Train) -> None:
    full = train("Unigram", ENGLISH, 40, "<unk>")
    with pytest.raises(Unmergeable, match="only BPE"):
        settled({"tokenizer_source": "base"}, with_rows(full, len(read_vocabulary(full).ids) - 1))


def test_a_tokenizer_without_tokenizer_json_takes_no_tokens(train: Train) -> None:
    older = {"vocab.json": b'{"a": 0, "b": 1}', "merges.txt": b"", "config.json": b'{"vocab_size": 2}'}
    newer = with_rows(train("BPE", CODE, 60, "<s>"))
    with pytest.raises(Unmergeable, match=r"m0 has no tokenizer\.json"):
        settled({"tokenizer_source": "union"}, older, newer)
    assert settled({"tokenizer_source": "base"}, older, newer)[0].plan.rows == 2


def test_holes_in_the_ids_take_no_tokens() -> None:
    holes = {"tokenizer.json": document({"a": 0, "b": 1, "c": 3}), "config.json": b'{"vocab_size": 4}'}
    told = {"tokenizer": {"source": "base", "tokens": {"<x>": {}}}}
    with pytest.raises(Unmergeable, match="m0 takes no more tokens: there is no free id"):
        settled(told, holes)
    assert settled({"tokenizer_source": "base"}, holes)[0].plan.rows == 4


# -- choosing ------------------------------------------------------------------------------------------------

TOLD: dict[str, Any] = {
    "source": "m1",
    "tokens": {
        "<a>": {"source": "m1"},
        "<b>": {"source": {"kind": "zero"}, "force": True},
        "<c>": {"source": {"kind": "model_token", "model": "m0", "token": "<s>"}},
        "<d>": {"source": {"kind": "model_token", "model": "m0", "token_id": 7}},
        "<e>": {"force": True},
    },
    "pad_to_multiple_of": 64,
}


def test_a_choice_is_read_and_written_and_renamed() -> None:
    for told in ({"tokenizer": TOLD}, {"tokenizer_source": "union"}, {"tokenizer_source": "./model"}):
        choice = choices.read(told, pytest.fail, lambda where, value: str(value))
        assert choice is not None and choice.to_value() == told
    renamed = choices.rename(
        choices.read({"tokenizer": TOLD}, pytest.fail, lambda where, value: str(value))
        or TokenizerChoice(source=""),
        {"m0": "x", "m1": "y"},
    )
    assert renamed.models == ("y", "x")
    assert choices.read({"models": []}, pytest.fail, lambda where, value: value) is None


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"tokenizer_source": "union", "tokenizer": {}}, "either"),
        ({"tokenizer": "union"}, "a mapping"),
        ({"tokenizer": {"sauce": "union"}}, "sauce: not supported"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "pad_to_multiple_of"),
        ({"tokenizer": {"pad_to_multiple_of": True}}, "pad_to_multiple_of"),
        ({"tokenizer": {"tokens": ["<x>"]}}, "a mapping"),
        ({"tokenizer": {"tokens": {7: {}}}}, "7: a token is text"),
        ({"tokenizer": {"tokens": {"<x>": {"from": "a"}}}}, "source and force"),
        ({"tokenizer": {"tokens": {"<x>": {"force": 1}}}}, "force"),
        ({"tokenizer": {"tokens": {"<x>": {"source": {"kind": "mean"}}}}}, "kind: zero"),
        ({"tokenizer": {"tokens": {"<x>": {"source": {"kind": "model_token", "model": "a"}}}}}, "either"),
        (
            {
                "tokenizer": {
                    "tokens": {"<x>": {"source": {"kind": "model_token", "model": "a", "token_id": -1}}}
                }
            },
            "token_id",
        ),
    ],
)
def test_faults_of_a_choice_are_told(told: dict[str, Any], why: str) -> None:
    faults: list[str] = []
    choices.read(told, faults.append, lambda where, value: str(value))
    assert len(faults) == 1 and why in faults[0]


def test_a_settled_choice_survives_its_bytes_and_lies_do_not(train: Train) -> None:
    models = [with_rows(train("BPE", text, 60, "<s>")) for text in (ENGLISH, CODE)]
    told = {"tokenizer": TOLD | {"tokens": TOLD["tokens"] | {"<a>": {"source": {"kind": "zero"}}}}}
    plan = settled(told, *models)[0].plan
    assert plan.source == 1 and plan.models == (0, 1) and plan.rows % 64 == 0
    assert plan.rules[2] == Rule(token="<c>", fill=FromToken(source=0, token="<s>"))
    value = plan.to_value()
    assert TokenizerPlan.parse(json.loads(json.dumps(value)), 2) == plan
    lies: list[dict[str, Any]] = [
        {"source": 2},
        {"source": True},
        {"models": []},
        {"models": [0, 0]},
        {"models": [0]},
        {"rows": 0},
        {"rows": 1 << 40},
        {"tensors": ["b", "a"]},
        {"tensors": "ab"},
        {"rules": [value["rules"][0], value["rules"][0]]},
        {"rules": [value["rules"][0] | {"force": 1}]},
        {"rules": [value["rules"][0] | {"fill": "mean"}]},
        {"rules": [value["rules"][0] | {"fill": {"source": 0}}]},
        {"rules": [value["rules"][0] | {"fill": {"source": 0, "token": "a", "row": 1}}]},
        {"rules": [value["rules"][0] | {"fill": {"source": 9, "row": 1}}]},
        {"more": 1},
    ]
    for lie in lies:
        with pytest.raises(ValueError):
            TokenizerPlan.parse(value | lie, 2)


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ({"source": "m7"}, "m7 is not one of the models"),
        ({"source": "m1"}, "the row of '<x>'"),
        ({"source": {"kind": "model_token", "model": "m0", "token": "<nowhere>"}}, "the row of '<x>'"),
        ({"source": {"kind": "model_token", "model": "m0", "token_id": 4000}}, "token 4000"),
    ],
)
def test_rules_that_ask_for_rows_that_are_not_there_are_refused(rule: Any, why: str, train: Train) -> None:
    models = [with_rows(train("BPE", text, 60, "<s>")) for text in (ENGLISH, CODE)]
    with pytest.raises(Unmergeable, match=why):
        settled({"tokenizer": {"source": "union", "tokens": {"<x>": rule}}}, *models)


def test_the_model_whose_tokenizer_is_damaged_is_named(train: Train) -> None:
    good, bad = with_rows(train("BPE", ENGLISH, 60, "<s>")), {"tokenizer.json": b"{}"}
    with pytest.raises(CorruptCheckpoint, match="m1: "):
        settled({"tokenizer_source": "union"}, good, bad)


def test_the_person_is_told_who_lacks_tokens(train: Train) -> None:
    models = [with_rows(train("BPE", ENGLISH, 60, "<s>", added=added)) for added in ((), ("<x>", "<y>"))]
    found, _ = settled({"tokenizer_source": "union"}, *models)
    assert [w for w in found.warnings if w.startswith("m0 lacks 2 of the ")] == list(found.warnings)


def test_embeddings_and_heads_are_found_by_name_and_rows() -> None:
    shapes = {
        "model.embed_tokens.weight": (16, 8),
        "lm_head.weight": (16, 8),
        "lm_head.bias": (16,),
        "transformer.wpe.weight": (16, 8),
        "model.norm.weight": (16,),
        "model.layers.0.mlp.up_proj.weight": (16, 8),
        "model.embed_tokens.scale": (8,),
    }
    tensors = {name: TensorInfo(dtype="F32", shape=shape) for name, shape in shapes.items()}
    expected = {"model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"}
    assert token_tensors(tensors, {"vocab_size": 16}) == expected
    assert token_tensors(tensors, {"text_config": {"vocab_size": 16}}) == expected
    assert token_tensors(tensors, {"vocab_size": 17}) == frozenset()


def test_the_config_says_how_many_rows_there_are_and_which_tokens_end_a_text() -> None:
    plan = TokenizerPlan(source=1, models=(0, 1), rows=64, tensors=())
    giver = {"eos_token_id": 7, "bos_token_id": 1, "hidden_size": 3}
    assert config_changes(plan, {"vocab_size": 60, "bos_token_id": 1}, giver) == {
        "vocab_size": 64,
        "eos_token_id": 7,
    }
    nested = {"text_config": {"vocab_size": 60, "hidden_size": 8}}
    assert config_changes(plan, nested, nested) == {"text_config.vocab_size": 64}


# -- chat templates ------------------------------------------------------------------------------------------

TALK = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": " Bye "},
]
SPOKEN = {
    "alpaca": "### Instruction:\nHello\n\n### Response:\nHi.\n\n### Instruction:\nBye\n\n### Response:\n",
    "chatml": "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
    "<|im_start|>user\n Bye <|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|][|endofturn|]\n[|user|]Hello\n"
    "[|assistant|]Hi.[|endofturn|]\n[|user|] Bye \n[|assistant|]",
    "gemma": "<s><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\nHi.<end_of_turn>\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Hello [/INST] Hi.</s>[INST]  Bye  [/INST]",
}


def spoken(template: str, messages: list[dict[str, str]]) -> str:
    """What transformers makes of a template."""

    def refuse(why: str) -> None:
        raise ValueError(why)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    jinja.globals["raise_exception"] = refuse
    made = jinja.from_string(template)
    return made.render(messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_named_templates_write_the_format_they_are_named_for(name: str) -> None:
    template = templates.written_out(name, [])
    assert template is not None and spoken(template, TALK) == SPOKEN[name]
    told = spoken(template, [{"role": "system", "content": "Be brief."}, *TALK])
    assert told.index("Be brief.") < told.index("Hello")


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_where_turns_are_taken_nobody_speaks_twice(name: str) -> None:
    with pytest.raises(ValueError, match="take turns"):
        spoken(templates.TEMPLATES[name], [TALK[0], TALK[0]])


def test_unknown_names_are_refused_with_those_that_are_known() -> None:
    faults: list[str] = []
    assert templates.read("chatlm", faults.append) is None
    assert "chatml" in faults[0] and "auto" in faults[0]
    assert templates.read(7, faults.append) is None and templates.read("", faults.append) is None
    assert len(faults) == 3
    assert templates.read("{{ messages }}", pytest.fail) == "{{ messages }}"


def test_auto_is_the_most_frequent_template_and_the_first_of_equals() -> None:
    def model(template: Any = None, jinja: bytes | None = None) -> Callable[[], Files]:
        config = {} if template is None else {"chat_template": template}
        files = {"tokenizer_config.json": json.dumps(config).encode()}
        return lambda: files if jinja is None else {**files, "chat_template.jinja": jinja}

    named = model([{"name": "tool", "template": "{c}"}, {"name": "default", "template": "{b}"}])
    assert templates.written_out("auto", [model("{a}"), model(" {b}\n"), named]) == "{b}"
    assert templates.written_out("auto", [model(), model("{a}"), model("{b}")]) == "{a}"
    assert templates.written_out("auto", [model("{a}", b"{c}"), model("{a}", b"{c}")]) == "{c}"
    assert templates.written_out("auto", [model()]) is None
    assert templates.written_out("{{ x }}", []) == "{{ x }}"
    # Longer than a plan takes, and of no use cut off.
    for long in (model("{" * (1 << 18) + "}"), model(None, b"{" * (1 << 18) + b"}")):
        with pytest.raises(CorruptCheckpoint, match="a chat template of 262145 characters"):
            templates.written_out("auto", [model("{a}"), long])


def test_every_refusal_is_a_typed_error_with_a_hint() -> None:
    for files in ({}, {"tokenizer.model": b""}, {"tokenizer.json": b"{}"}):
        with pytest.raises(MergeCoreError) as caught:
            read_vocabulary(files)
        assert caught.value.hint
