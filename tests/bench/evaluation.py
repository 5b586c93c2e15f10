"""How fast is scoring? Our scores against a plain transformers loop: same items, same process, in turns.

    python tests/bench/evaluation.py --rounds 12

exact_match    the zoo's tasks on an expert; the plain loop pads on the left and calls `generate`
bits_per_byte  texts of many lengths on a random Llama of 5 M parameters that reads bytes; the plain loop pads
               on the right and takes the cross-entropy

The plain loops take batches of 64 in the order of the items, as one writes them; what they find has to agree
with ours. A ratio is our speed over theirs, the median over rounds, with a percentile bootstrap of it. The
story goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from merge_core.evaluation.loading import load_model, load_tokenizer
from merge_core.evaluation.scoring import BATCH, score
from merge_core.evaluation.tasks import Metric, Task
from merge_core.zoo.build import build
from merge_core.zoo.domains import DEMO_DOMAINS
from merge_core.zoo.recipes import Shape
from merge_core.zoo.tasks import task as named
from merge_core.zoo.threads import one_thread_each
from merge_core.zoo.tokens import tokenizer_for

WANTED = 0.8
BOOTSTRAP_SEED = 20_241_120
REPLICATES = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    with (
        tempfile.TemporaryDirectory(prefix="weft-bench-") as folder,
        one_thread_each(),
        torch.inference_mode(),
    ):
        print(json.dumps({"exact_match": exact(Path(folder), rounds), "bits_per_byte": texts(rounds)}))


def exact(folder: Path, rounds: int) -> dict[str, Any]:
    """The three tasks of the demo as one, on the expert of the first."""
    with torch.inference_mode(mode=False):
        expert = build(folder / "zoo", seed=0, size="fixture").experts["rev"]
    model, tokenizer = load_model(expert), load_tokenizer(expert)
    items = [item for domain in DEMO_DOMAINS for item in named(f"{domain}:test").items]
    random.Random(0).shuffle(items)
    task = Task(name="demo", metric=Metric.EXACT_MATCH, items=tuple(items))
    plain = wrapped(tokenizer, "left")
    longest = max(len(tokenizer.encode(item.answer, add_special_tokens=False).ids) for item in items)
    ours = score(model, tokenizer, task).hits
    theirs = generated(model, plain, task, longest + 1)
    assert ours == theirs, "the two loops disagree"
    return compared(
        "exact match",
        lambda: score(model, tokenizer, task),
        lambda: generated(model, plain, task, longest + 1),
        rounds,
    )


def generated(model: Any, tokenizer: Any, task: Task, most: int) -> tuple[bool, ...]:
    """Right or wrong by `generate`."""
    hits: list[bool] = []
    for start in range(0, len(task.items), BATCH):
        items = task.items[start : start + BATCH]
        asked = tokenizer([item.prompt for item in items], padding=True, return_tensors="pt")
        asked.pop("token_type_ids", None)
        told = model.generate(
            **asked, max_new_tokens=most, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        for item, row in zip(items, told[:, asked["input_ids"].shape[1] :].tolist(), strict=True):
            ended = tokenizer.eos_token_id in row
            answer = tokenizer.decode(row[: row.index(tokenizer.eos_token_id)]) if ended else None
            hits.append(answer == item.answer)
    return tuple(hits)


def texts(rounds: int) -> dict[str, Any]:
    """Python's documentation, each text after its first letter and cut to 20 to 127 bytes."""
    rng = random.Random(0)
    items = [replace(item, answer=item.answer[: rng.randint(20, 127)]) for item in named("docs:test").items]
    task = Task(name="texts", metric=Metric.BITS_PER_BYTE, items=tuple(items))
    shape = Shape(hidden=256, intermediate=704, layers=6, vocabulary=256, context=128)
    model, tokenizer, plain = sized(shape), tokenizer_for(shape).backend_tokenizer, tokenizer_for(shape)
    plain.pad_token = plain.convert_ids_to_tokens(0)
    ours, theirs = score(model, tokenizer, task).value, surprise(model, plain, task)
    assert math.isclose(ours, theirs, rel_tol=1e-5), (ours, theirs)
    return compared(
        "bits per byte",
        lambda: score(model, tokenizer, task),
        lambda: surprise(model, plain, task),
        rounds,
    )


def sized(shape: Shape) -> Any:
    """A Llama of a shape with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.context,
    )
    return LlamaForCausalLM(config).eval()


def surprise(model: Any, tokenizer: Any, task: Task) -> float:
    """Bits per byte by the cross-entropy of padded batches."""
    nats = size = 0.0
    for start in range(0, len(task.items), BATCH):
        items = task.items[start : start + BATCH]
        asked = tokenizer(
            [item.prompt + item.answer for item in items],
            padding=True,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        labels = asked["input_ids"].masked_fill(asked["attention_mask"] == 0, -100)
        for row, item in enumerate(items):
            labels[row, : len(item.prompt)] = -100
        logits = model(**asked, use_cache=False).logits[:, :-1]
        nats += float(cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"))
        size += sum(len(item.answer.encode()) for item in items)
    return nats / math.log(2) / size


def compared(
    what: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int
) -> dict[str, Any]:
    """Our speed over theirs, timed in turns after one of each; who goes first changes."""
    seconds = np.empty((rounds, 2))
    for number in range(-1, rounds):
        order = (0, 1) if number % 2 else (1, 0)
        for place in order:
            began = time.perf_counter()
            (ours, theirs)[place]()
            if number >= 0:
                seconds[number, place] = time.perf_counter() - began
    ratios = seconds[:, 1] / seconds[:, 0]
    drawn = np.random.default_rng(BOOTSTRAP_SEED).choice(ratios, (REPLICATES, rounds))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    mine, plain = np.median(seconds, axis=0)
    ratio = float(np.median(ratios))
    tell(f"{what}: ours {mine:.3f} s, plain {plain:.3f} s: {ratio:.2f} of its speed (wanted {WANTED})")
    return {"ratio": ratio, "ci95": [float(low), float(high)]}


def wrapped(tokenizer: Tokenizer, side: str) -> Any:
    """A tokenizer as transformers has them, with the zoo's special tokens."""
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side=side, **names)


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
