"""How the zoo's models are trained: a part-skilled base, then experts that keep the base's ways elsewhere.

Three things decide whether such small experts merge. The base stops by skill per domain, not by steps, so
that no domain is left out or finished. An expert pays KL(base || expert) on the other domains' sequences:
without that the sum of the task vectors scores nothing (the cost: an expert's training sees the other
domains' prompts, though no answer of theirs is asked for). And because the task vectors then hardly
conflict, they are summed, not averaged.

Everything is a function of (recipe, seed): one generator, one thread, no global state left behind.
Muon: https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from merge_core.zoo.domains import BOS, DEMO_DOMAINS, DOMAINS, EOS, LENGTH, PAD, VOCABULARY, encode, items

Progress = Callable[[str, int, int], None]
"""Told (what, done, total) as training goes on."""

_IGNORED = -100

# Standard deviations at the start. Llama's usual 0.02 leaves the base so small that the experts' steps
# bend it: sums of task vectors then scored 74 to 92 % where these give 95 to 99 (five seeds).
_MATRIX_SPREAD = 0.06
_EMBEDDING_SPREAD = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecipe:
    """Sizes and settings of one zoo; the learning rates are those of the demo size."""

    hidden: int = 96
    intermediate: int = 192
    layers: int = 2
    heads: int = 4
    domains: tuple[str, ...] = DEMO_DOMAINS
    base_batch: int = 96
    base_skill: float = 0.12
    base_plenty: float = 0.30
    base_max_steps: int = 300
    expert_steps: int = 120
    expert_batch: int = 64
    expert_elsewhere: int = 32
    expert_rate: float = 1e-3
    kl_weight: float = 1.0


RECIPES = {
    "demo": TrainingRecipe(),
    "fixture": TrainingRecipe(hidden=64, intermediate=128, base_batch=64, expert_steps=100),
}


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token ids [items, LENGTH] int64, and labels of the same shape that ignore all but answer and EOS."""

    ids: Tensor
    labels: Tensor

    def draw(self, count: int, generator: torch.Generator) -> Sequences:
        """`count` rows with replacement."""
        rows = torch.randint(len(self.ids), (count,), generator=generator)
        return Sequences(self.ids[rows], self.labels[rows])


def sequences(domain: str, split: str) -> Sequences:
    """All items of one split as padded token ids."""
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


def new_model(recipe: TrainingRecipe, generator: torch.Generator) -> LlamaForCausalLM:
    """An untrained Llama of the recipe's shape, float32, tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                spread = _EMBEDDING_SPREAD if "embed" in name else _MATRIX_SPREAD
                parameter.normal_(0.0, spread, generator=generator)
    return model


def train_base(recipe: TrainingRecipe, generator: torch.Generator, on_progress: Progress) -> LlamaForCausalLM:
    """Train on all domains until each one's dev accuracy reaches `base_skill`; return the weight average.

    A thermostat feeds every domain by its dev accuracy: fully below `base_skill`, a tenth below
    `base_plenty`, nothing above.
    """
    train = {name: sequences(name, "train") for name in recipe.domains}
    dev = {name: sequences(name, "dev") for name in recipe.domains}
    model = new_model(recipe, generator)
    average = copy.deepcopy(model)
    optimizers = _base_optimizers(model)
    shares = dict.fromkeys(recipe.domains, 1.0)
    for step in range(1, recipe.base_max_steps + 1):
        counts = _divide(recipe.base_batch, shares)
        batch = joined([train[name].draw(count, generator) for name, count in counts.items() if count])
        _step(model, optimizers, _cross_entropy(model, batch), warm_up=min(1.0, step / 30))
        _follow(average, model, decay=0.9)
        if step % 5 == 0:
            skill = {name: exact_share(average, dev[name]) for name in recipe.domains}
            on_progress("train base", step, recipe.base_max_steps)
            if min(skill.values()) >= recipe.base_skill:
                break
            shares = {name: _thermostat(recipe, share) for name, share in skill.items()}
    return average


def train_expert(
    base: LlamaForCausalLM,
    domain: str,
    recipe: TrainingRecipe,
    generator: torch.Generator,
    on_progress: Progress,
) -> LlamaForCausalLM:
    """Fine-tune the base on one domain while its predictions elsewhere stay the base's."""
    own = sequences(domain, "train")
    elsewhere = joined([sequences(name, "train") for name in recipe.domains if name != domain])
    expert = copy.deepcopy(base)
    adam = torch.optim.AdamW(expert.parameters(), lr=recipe.expert_rate, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(1, recipe.expert_steps + 1):
        loss = _cross_entropy(expert, own.draw(recipe.expert_batch, generator))
        away = elsewhere.draw(recipe.expert_elsewhere, generator)
        loss = loss + recipe.kl_weight * _divergence(base, expert, away)
        _step(expert, [adam], loss, warm_up=_cosine(step, recipe.expert_steps))
        if step % 10 == 0:
            on_progress(f"train expert {domain}", step, recipe.expert_steps)
    return expert


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
    return nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), wanted)


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


def _thermostat(recipe: TrainingRecipe, skill: float) -> float:
    if skill < recipe.base_skill:
        return 1.0
    return 0.1 if skill < recipe.base_plenty else 0.0


def _divide(count: int, shares: dict[str, float]) -> dict[str, int]:
    total = sum(shares.values())
    return {name: round(count * share / total) for name, share in shares.items()}


def _cosine(step: int, steps: int, warm_up: int = 20, floor: float = 0.05) -> float:
    if step < warm_up:
        return step / warm_up
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))
