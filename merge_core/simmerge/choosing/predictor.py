"""The Predictor: from the features of an ordered pair to what each operator's merge would be worth.

    told = Predictor.parse(data).predict(values, missing)      # NAMES as `features` has them, or `default()`
    told.utility, told.width                                   # float64[..., operators]

A small network whose last layer is one head for each operator, in several members that were trained apart:
their mean is the prediction, their spread its width. A ridge, which little data calls for, is the same
without hidden layers. Inference is numpy's; training lies in `training`. Stored as safetensors and JSON, with
what it was trained on, never as a pickle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from merge_core.digest import Digest, check_version, sha256
from merge_core.errors import CorruptCheckpoint
from merge_core.simmerge import container

MAX_PREDICTOR = 8 << 20
MAX_NAME = 120
MAX_FEATURES = 1024
MAX_OPERATORS = 64
MAX_WIDE = 4.0
"""Standard deviations beyond which a feature counts no further."""
UNIT = 1 << 12
"""An embedding is told in whole numbers of 1/UNIT."""
MAX_EMBEDDED = 8
"""What a number of an embedding is clipped to."""

_VERSION = 1
_METADATA = "predictor"
_KEYS = {"version", "names", "operators", "flags", "layers", "provenance"}
_DEFAULT = "predictor.safetensors"

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """`weights` float32[members, in, out] and `bias` float32[members, out]; ReLU follows all but the last."""

    weights: Floats
    bias: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prediction:
    """What each member says: float64[members, ..., operators]."""

    members: Doubles

    @property
    def utility(self) -> Doubles:
        """float64[..., operators]: the mean over members."""
        found: Doubles = self.members.mean(axis=0)
        return found

    @property
    def width(self) -> Doubles:
        """float64[..., operators]: the standard deviation over members."""
        found: Doubles = self.members.std(axis=0)
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Settled:
    """Whole numbers of 1/UNIT that do not depend on the machine."""

    embedding: Integers
    """int64[..., embedded]: what the first member hands to its heads, and a constant at the end."""
    utility: Integers
    """int64[..., operators]: the mean over members."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """What was learned, and how its input is prepared; one that exists is sound."""

    names: tuple[str, ...]
    """The features, in the order in which they are read."""
    operators: tuple[str, ...]
    centre: Floats
    """[features]: what is taken off, the mean in training."""
    spread: Floats
    """[features]: what is divided by, the standard deviation in training."""
    flags: tuple[tuple[int, ...], ...]
    """Features that are known or missing together: each set is one more input, the share that is missing."""
    layers: tuple[Layer, ...]
    provenance: Mapping[str, Any]
    """JSON without floats: the data and the settings of the training."""

    def __post_init__(self) -> None:
        why = _problem(self)
        if why:
            raise ValueError(why)

    def predict(self, values: npt.NDArray[Any], missing: Flags) -> Prediction:
        """Predict for features [..., len(names)]; what is missing may hold any number."""
        signal = self.inputs(values, missing).astype(np.float32)
        rows = np.broadcast_to(
            signal.reshape(-1, signal.shape[-1]), (self.members, signal[..., 0].size, signal.shape[-1])
        )
        for number, layer in enumerate(self.layers):
            rows = rows @ layer.weights + layer.bias[:, None]
            if number < len(self.layers) - 1:
                rows = np.maximum(rows, 0.0)
        found = rows.astype(np.float64).reshape(self.members, *signal.shape[:-1], len(self.operators))
        return Prediction(members=found)

    def inputs(self, values: npt.NDArray[Any], missing: Flags) -> Doubles:
        """float64[..., features + flags]: in standard deviations, 0 for what is missing; then the flags."""
        scaled = (np.asarray(values, np.float64) - self.centre) / self.spread
        known = np.where(missing, 0.0, np.clip(scaled, -MAX_WIDE, MAX_WIDE))
        shares = [missing[..., list(columns)].mean(axis=-1) for columns in self.flags]
        return np.concatenate([known, *[share[..., None] for share in shares]], axis=-1)

    def settle(self, values: npt.NDArray[Any], missing: Flags) -> Settled:
        """Embed and predict to the same whole numbers on every machine.

        Products and sums in float64, one after the other in a fixed order, which a library for matrices does
        not promise: slower than `predict`, and for records that machines have to add up alike.
        """
        signal = self.inputs(values, missing)
        signal = np.broadcast_to(signal, (self.members, *signal.shape))
        for layer in self.layers[:-1]:
            signal = np.maximum(_in_order(signal, layer), 0.0)
        told = _in_order(signal, self.layers[-1])
        total = told[0]
        for other in told[1:]:
            total = total + other
        whole = np.rint(np.clip(signal[0], -MAX_EMBEDDED, MAX_EMBEDDED) * UNIT).astype(np.int64)
        constant = np.full((*whole.shape[:-1], 1), UNIT, np.int64)
        return Settled(
            embedding=np.concatenate([whole, constant], axis=-1),
            utility=np.rint(np.clip(total / self.members, -1.0, 2.0) * UNIT).astype(np.int64),
        )

    @property
    def members(self) -> int:
        """How many were trained apart."""
        return len(self.layers[0].weights)

    @property
    def embedded(self) -> int:
        """The width of an embedding."""
        return int(self.layers[-1].weights.shape[1]) + 1

    @cached_property
    def digest(self) -> Digest:
        """Of the bytes."""
        return sha256(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The one spelling: `Predictor.parse(p.to_bytes()).to_bytes() == p.to_bytes()`."""
        told = {
            "version": _VERSION,
            "names": self.names,
            "operators": self.operators,
            "flags": self.flags,
            "layers": len(self.layers),
            "provenance": self.provenance,
        }
        arrays = {"centre": self.centre, "spread": self.spread}
        for number, layer in enumerate(self.layers):
            arrays |= {f"layer.{number}.weights": layer.weights, f"layer.{number}.bias": layer.bias}
        return container.write(told, arrays, name=_METADATA)

    @classmethod
    def parse(cls, data: bytes) -> Predictor:
        """Read a predictor from anybody; raises CorruptCheckpoint on whatever is not exact."""
        try:
            if len(data) > MAX_PREDICTOR:
                raise ValueError(f"{len(data)} bytes; at most {MAX_PREDICTOR} are read")
            told, arrays = container.read(data, name=_METADATA)
            if not isinstance(told, dict) or set(told) != _KEYS or type(told["layers"]) is not int:
                raise ValueError("keys")
            check_version(told["version"], _VERSION, "predictor")
            found = cls(
                names=tuple(map(_name, told["names"])),
                operators=tuple(map(_name, told["operators"])),
                centre=arrays["centre"],
                spread=arrays["spread"],
                flags=tuple(tuple(map(_column, columns)) for columns in told["flags"]),
                layers=tuple(
                    Layer(weights=arrays[f"layer.{i}.weights"], bias=arrays[f"layer.{i}.bias"])
                    for i in range(min(told["layers"], len(arrays)))
                ),
                provenance=dict(told["provenance"]),
            )
            if found.to_bytes() != data:
                raise ValueError("it is spelled in another way than weft spells it")
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise CorruptCheckpoint(f"not a predictor: {error}", hint="weft plan --help") from error
        return found


@cache
def default() -> Predictor:
    """The predictor that ships with weft, trained on the experts of its own catalogue (`make predictor`)."""
    return Predictor.parse(resources.files("merge_core.simmerge.choosing").joinpath(_DEFAULT).read_bytes())


def _in_order(signal: Doubles, layer: Layer) -> Doubles:
    """A layer for float64[members, ..., in], its products added one column after the other."""
    between = (1,) * (signal.ndim - 2)
    members, columns, out = layer.weights.shape
    total: Doubles = layer.bias.astype(np.float64).reshape(members, *between, out)
    weights = layer.weights.astype(np.float64).reshape(members, columns, *between, out)
    for column in range(columns):
        total = total + signal[..., column, None] * weights[:, column]
    return total


def _problem(predictor: Predictor) -> str | None:
    """Why names and arrays do not belong together; None where they do."""
    count, operators = len(predictor.names), len(predictor.operators)
    if not 1 <= count <= MAX_FEATURES or len(set(predictor.names)) != count:
        return f"{count} features"
    if not 1 <= operators <= MAX_OPERATORS or len(set(predictor.operators)) != operators:
        return f"{operators} operators"
    if any(not columns or max(columns) >= count or min(columns) < 0 for columns in predictor.flags):
        return "flags of no features"
    if predictor.centre.shape != (count,) or predictor.spread.shape != (count,):
        return "centre and spread are not those of the features"
    if not np.isfinite(predictor.centre).all() or not (predictor.spread > 0).all():
        return "centre and spread are no numbers to scale by"
    return _unfit(predictor.layers, count + len(predictor.flags), operators)


def _unfit(layers: Sequence[Layer], width: int, operators: int) -> str | None:
    """Why layers do not lead from the inputs to the operators."""
    members = len(layers[0].weights) if layers and layers[0].weights.ndim == 3 else 0
    for layer in layers:
        if layer.weights.ndim != 3 or layer.weights.shape[:2] != (members, width) or not members:
            return f"a layer of shape {layer.weights.shape} after {width} numbers"
        width = layer.weights.shape[2]
        if layer.bias.shape != (members, width):
            return f"a bias of shape {layer.bias.shape}"
        arrays = (layer.weights, layer.bias)
        if any(array.dtype != np.float32 or not np.isfinite(array).all() for array in arrays):
            return "a layer holds what is no number"
    return None if layers and width == operators else f"{width} heads for {operators} operators"


def _name(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME or not value.isprintable():
        raise ValueError("a name is printable text")
    return value


def _column(value: Any) -> int:
    if type(value) is not int:
        raise ValueError("a flag lists numbers of features")
    return value
