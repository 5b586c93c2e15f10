"""How the zoo's models are trained: a base, then experts that keep the base's ways elsewhere.

Everything is a function of (recipe, seed): one generator for each model, one thread, no global state left
behind. Why an expert pays KL(base || expert) on the other domains' sequences: without that the sum of the
task vectors scores nothing. The cost: its training sees the other domains' prompts, though no answer of
theirs is asked for.
Muon: https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from merge_core.zoo import text
from merge_core.zoo.domains import BOS, DOMAINS, EOS, LENGTH, PAD, VOCABULARY, encode, items
from merge_core.zoo.recipes import BaseTraining, ExpertTraining, Shape

Progress = Callable[[str, int, int], None]
"""Told (what, done, total) as training goes on."""

_IGNORED = -100

# Standard deviations at the start. Llama's usual 0.02 leaves the base so small that the experts' steps
# bend it: sums of task vectors then scored 74 to 92 % where these give 95 to 99 (five seeds).
_MATRIX_SPREAD = 0.06
_EMBEDDING_SPREAD = 0.1


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token ids [items, length] int64, and labels of the same shape that ignore what is not to be learned."""

    ids: Tensor
    labels: Tensor

    def first(self, count: int) -> Sequences:
        """The first `count` rows."""
        return Sequences(self.ids[:count], self.labels[:count])

    def draw(self, count: int, generator: torch.Generator) -> Sequences:
        """`count` rows with replacement."""
        rows = torch.randint(len(self.ids), (count,), generator=generator)
        return Sequences(self.ids[rows], self.labels[rows])


@lru_cache(maxsize=64)
def sequences(domain: str, split: str) -> Sequences:
    """All items of one split: padded, only answer and EOS to be learned; of text, every byte."""
    if domain in text.TEXT_DOMAINS:
        read = bytearray("".join(text.rows(domain, split)).encode())
        rows = torch.frombuffer(read, dtype=torch.uint8).view(-1, text.LENGTH).long()
        return Sequences(rows, rows)
    task = DOMAINS[domain]
    ids, labels = [], []
    for item in items(task, split):
        question, answer = [BOS, *encode(task.question(item))], [*encode(item.answer), EOS]
        padding = LENGTH - len(question) - len(answer)
        ids.append([*question, *answer, *[PAD] * padding])
        labels.append([*[_IGNORED] * len(question), *answer, *[_IGNORED] * padding])
    return Sequences(torch.tensor(ids), torch.tensor(labels))


def joined(parts: Sequence[Sequences]) -> Sequences:
    """Several sets of sequences as one."""
    return Sequences(torch.cat([p.ids for p in parts]), torch.cat([p.labels for p in parts]))


def new_model(shape: Shape, generator: torch.Generator) -> LlamaForCausalLM:
    """An untrained Llama, float32, tied embeddings."""
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        use_cache=False,
        **(special if shape.vocabulary == VOCABULARY else dict.fromkeys(special)),
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                spread = _EMBEDDING_SPREAD if "embed" in name else _MATRIX_SPREAD
                parameter.normal_(0.0, spread, generator=generator)
    return model


def train_base(
    shape: Shape, training: BaseTraining, generator: torch.Generator, on_progress: Progress
) -> LlamaForCausalLM:
    """Train on all domains until each has its skill, or for all steps; return the weight average."""
    train = {name: sequences(name, "train") for name in training.domains}
    dev = {name: sequences(name, "dev") for name in training.domains if training.skill is not None}
    model = new_model(shape, generator)
    average = copy.deepcopy(model)
    optimizers = _base_optimizers(model)
    shares: Mapping[str, float] = dict.fromkeys(training.domains, 1.0)
    for step in range(1, training.steps + 1):
        batch = _drawn(train, shares, training.batch, generator)
        _step(model, optimizers, _cross_entropy(model, batch), warm_up=min(1.0, step / 30))
        _follow(average, model, decay=0.9)
        if step % 5 == 0:
            on_progress("train base", step, training.steps)
        if training.skill is not None and step % 5 == 0:
            skill = {name: exact_share(average, among) for name, among in dev.items()}
            if min(skill.values()) >= training.skill:
                break
            shares = {name: _thermostat(training, share) for name, share in skill.items()}
    return average


def train_expert(
    base: LlamaForCausalLM,
    name: str,
    training: ExpertTraining,
    generator: torch.Generator,
    on_progress: Progress,
) -> LlamaForCausalLM:
    """Fine-tune the base on its own domains while its predictions elsewhere stay the base's."""
    own = {domain: sequences(domain, "train") for domain in training.own}
    elsewhere = joined([sequences(domain, "train") for domain in training.elsewhere])
    expert = copy.deepcopy(base)
    adam = torch.optim.AdamW(expert.parameters(), lr=training.rate, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(1, training.steps + 1):
        loss = _cross_entropy(expert, _drawn(own, training.own, training.batch, generator))
        if training.kl_weight:
            away = elsewhere.draw(training.batch_elsewhere, generator)
            loss = loss + training.kl_weight * _divergence(base, expert, away)
        _step(expert, [adam], loss, warm_up=_cosine(step, training.steps))
        if step % 10 == 0:
            on_progress(f"train expert {name}", step, training.steps)
    return expert


def fine_tune(
    model: LlamaForCausalLM, examples: Sequences, *, steps: int = 120, rate: float = 1e-3
) -> LlamaForCausalLM:
    """A copy of a model that has learned a few examples, all of them at each step: the control of a merge."""
    tuned = copy.deepcopy(model)
    adam = torch.optim.AdamW(tuned.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(1, steps + 1):
        _step(tuned, [adam], _cross_entropy(tuned, examples), warm_up=_cosine(step, steps))
    return tuned


@torch.no_grad()
def exact_share(model: LlamaForCausalLM, among: Sequences) -> float:
    """The share of items whose whole answer greedy decoding would give.

    One pass over the right answers is enough: greedy decoding is exact when, and only when, every
    next-token maximum along the right answer is right.
    """
    predicted = model(input_ids=among.ids).logits[:, :-1].argmax(-1)
    labels = among.labels[:, 1:]
    return float(((predicted == labels) | (labels == _IGNORED)).all(dim=1).float().mean())


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz iterations; for matrices only."""

    def __init__(self, parameters: Sequence[nn.Parameter], *, lr: float, momentum: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                velocity = state.setdefault("velocity", torch.zeros_like(parameter))
                velocity.mul_(group["momentum"]).add_(parameter.grad)
                nudged = parameter.grad + group["momentum"] * velocity
                rows, columns = parameter.shape
                scale = math.sqrt(max(1.0, rows / columns))
                parameter.sub_(group["lr"] * scale * _orthogonal(nudged))


def _orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values end between about 0.7 and 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    x: Tensor = wide / (wide.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def _base_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named.items() if p.ndim != 2 or "embed" in name]
    return [Muon(matrices, lr=0.007), torch.optim.AdamW(others, lr=1.5e-3, weight_decay=0.0)]


def _step(
    model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer], loss: Tensor, *, warm_up: float
) -> None:
    """One clipped update at `warm_up` times the optimizers' own learning rates."""
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])
            group["lr"] = group["peak"] * warm_up
        optimizer.step()


def _cross_entropy(model: LlamaForCausalLM, batch: Sequences) -> Tensor:
    logits: Tensor = model(input_ids=batch.ids).logits[:, :-1]
    wanted = batch.labels[:, 1:].reshape(-1)
    return nn.functional.cross_entropy(logits.flatten(0, 1), wanted)


def _divergence(base: LlamaForCausalLM, expert: LlamaForCausalLM, batch: Sequences) -> Tensor:
    """KL(base || expert) at every position that is not padding, mean over positions, in nats.

    On the answers alone it held the experts too loosely: sums scored 9 points less on two seeds.
    """
    counted = batch.ids[:, :-1] != PAD
    with torch.no_grad():
        wanted = base(input_ids=batch.ids).logits[:, :-1][counted].log_softmax(-1)
    got = expert(input_ids=batch.ids).logits[:, :-1][counted].log_softmax(-1)
    return nn.functional.kl_div(got, wanted, log_target=True, reduction="batchmean")


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, *, decay: float) -> None:
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1.0 - decay)


def _thermostat(training: BaseTraining, skill: float) -> float:
    if training.skill is None or skill < training.skill:
        return 1.0
    return 0.1 if skill < training.plenty else 0.0


def _drawn(
    among: Mapping[str, Sequences], shares: Mapping[str, float], count: int, generator: torch.Generator
) -> Sequences:
    """About `count` sequences, divided by the shares of their domains."""
    total = sum(shares.values())
    counts = {name: round(count * share / total) for name, share in shares.items()}
    return joined([among[name].draw(drawn, generator) for name, drawn in counts.items() if drawn])


def _cosine(step: int, steps: int, warm_up: int = 20, floor: float = 0.05) -> float:
    if step < warm_up:
        return step / warm_up
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))
