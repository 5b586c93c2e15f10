"""Prediction: what a model says to tokens that are known, in batches that do not show in the result.

Rows are sorted by length and padded on the right, where no causal model looks: there is nothing to mask, and
positions count from the first token. What is longer than the model's context is read through windows that
move on by half of themselves, so that all but the first tokens are predicted from at least half a window.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

Progress = Callable[[int, int], None]

_LOGITS = 1 << 27
"""Numbers in the logits of a batch: half a GiB of float32, unless one row alone has more."""
_IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Token ids of which those from `start` (at least 1) on are to be predicted."""

    ids: list[int]
    start: int

    @property
    def count(self) -> int:
        """How many tokens are to be predicted."""
        return len(self.ids) - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a model says to each token that was to be predicted, in order.

    `nats` of the token that comes, `picks` what the model itself would write there (of equals the lowest id),
    and `margins` by how much its logit is the largest; the last two only where they were wanted.
    """

    nats: list[float]
    picks: list[int]
    margins: list[float]

    def upto(self, count: int) -> Told:
        """What is said to the first `count` tokens."""
        return Told(nats=self.nats[:count], picks=self.picks[:count], margins=self.margins[:count])


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """A causal language model of transformers, and how it is run; `on_progress` gets (tokens done, tokens).

    `model` lies on `device` and is in eval mode; the caller turns gradients off.
    """

    model: Any
    batch_size: int
    device: str = "cpu"
    on_progress: Progress = lambda done, total: None

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def context(self) -> int | None:
        """How many tokens the model sees at once; None where its config states no limit."""
        config = self.model.config
        stated = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        return stated if type(stated) is int and stated >= 2 else None

    def alone(self) -> Predictor:
        """The same model with every row by itself."""
        return replace(self, batch_size=1, on_progress=lambda done, total: None)

    def predict(
        self, asked: Sequence[Asked], *, picking: bool = False, window: int | None = None
    ) -> list[Told]:
        """What the model says to each of `asked`, seen through at most `window` tokens."""
        size = min((limit for limit in (window, self.context) if limit), default=None)
        owned = [(index, row) for index, one in enumerate(asked) for row in windows(one, size)]
        rows = [row for _, row in owned]
        found: dict[int, Told] = {}
        done, total = 0, sum(row.count for row in rows)
        for batch in self._batches(rows):
            found |= zip(batch, self._run([rows[i] for i in batch], picking), strict=True)
            done += sum(rows[i].count for i in batch)
            self.on_progress(done, total)
        joined = [Told(nats=[], picks=[], margins=[]) for _ in asked]
        for index, (owner, _) in enumerate(owned):
            joined[owner].nats.extend(found[index].nats)
            joined[owner].picks.extend(found[index].picks)
            joined[owner].margins.extend(found[index].margins)
        return joined

    def _batches(self, rows: Sequence[Asked]) -> Iterator[list[int]]:
        """Indices of rows, the longest first, as many at once as the bounds allow."""
        batch: list[int] = []
        least = 0
        for index in sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i)):
            first = rows[batch[0] if batch else index]
            begin = min(least, rows[index].start)
            # What is padded, or known at the start of another row, takes as much as what is wanted.
            numbers = (len(batch) + 1) * (len(first.ids) - begin + 1) * self.vocabulary
            if batch and (len(batch) == self.batch_size or numbers > _LOGITS):
                yield batch
                batch = []
            least = min(least, rows[index].start) if batch else rows[index].start
            batch.append(index)
        if batch:
            yield batch

    def _run(self, rows: Sequence[Asked], picking: bool) -> list[Told]:
        """One pass over rows, the first of which is the longest."""
        ids, wanted, kept = _padded(rows)
        logits = self._logits(ids.to(self.device), kept)
        flat = cross_entropy(
            logits.flatten(0, 1), wanted.flatten().to(self.device), ignore_index=_IGNORED, reduction="none"
        )
        nats, counted = flat.view(wanted.shape).cpu(), wanted != _IGNORED
        if not picking:
            return [
                Told(nats=n[c].tolist(), picks=[], margins=[]) for n, c in zip(nats, counted, strict=True)
            ]
        picks, best = logits.argmax(-1).cpu(), logits.topk(2, dim=-1).values.cpu()
        margins = best[..., 0] - best[..., 1]
        return [
            Told(nats=n[c].tolist(), picks=p[c].tolist(), margins=m[c].tolist())
            for n, p, m, c in zip(nats, picks, margins, counted, strict=True)
        ]

    def _logits(self, ids: Tensor, kept: int) -> Tensor:
        """Logits for the last `kept` tokens of each row, float32: those that come before each of them."""
        takes = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        options = {"logits_to_keep": kept + 1} if takes else {}
        logits: Tensor = self.model(input_ids=ids, use_cache=False, **options).logits
        return logits[:, -kept - 1 : -1].float()

    def follow(self, ids: Sequence[int], steps: int) -> Iterator[int]:
        """Go on greedily after `ids`, at most `steps` tokens, each computed when it is asked for."""
        seen, cache = list(ids), None
        given = seen
        for _ in range(steps):
            if self.context is not None and len(seen) > self.context:
                seen = seen[-self.context :]  # every position moves, and nothing that is cached holds
                given, cache = seen, None
            told = self.model(
                input_ids=torch.tensor([given], device=self.device), past_key_values=cache, use_cache=True
            )
            token = int(told.logits[0, -1].float().argmax())
            yield token
            seen.append(token)
            cache = getattr(told, "past_key_values", None)
            given = seen if cache is None else [token]


def _padded(rows: Sequence[Asked]) -> tuple[Tensor, Tensor, int]:
    """Ids [rows, length] int64; the wanted ones among the last `kept` of each row, else ignored; `kept`."""
    length = len(rows[0].ids)
    kept = length - min(row.start for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    wanted = torch.full((len(rows), kept), _IGNORED)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        begin = row.start - (length - kept)
        wanted[index, begin : begin + row.count] = torch.tensor(row.ids[row.start :])
    return ids, wanted, kept


def windows(asked: Asked, size: int | None) -> Iterator[Asked]:
    """What is asked as stretches of at most `size` tokens, each predicting where the one before ended."""
    if size is None or len(asked.ids) <= size:
        yield asked
        return
    done = asked.start
    begin = 0 if done < size else done - size // 2
    while done < len(asked.ids):
        end = min(begin + size, len(asked.ids))
        yield Asked(ids=asked.ids[begin:end], start=done - begin)
        done, begin = end, end - size // 2
