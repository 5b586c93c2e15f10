"""The MergePlan: a merge with nothing left open, with canonical bytes and a digest.

A plan has steps. Nearly always there is one; a recipe that merges in several rounds has one for each, and
the last makes the result. A step takes tensors from the plan's inputs and from the results of earlier steps:
an Operand counts through both. A plan names no holder and no path, so two people who write the same recipe
over the same models get the same plan, and the same result. `MergePlan.parse(plan.to_bytes()) == plan`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any

from merge_core.checkpoint import dtypes, merkle
from merge_core.checkpoint.manifest import MAX_DIMENSIONS, MAX_TENSORS, TENSOR_NAME
from merge_core.checkpoint.source import TensorInfo
from merge_core.config_keys import CHANGED, NESTED
from merge_core.digest import Digest, ModelId, canonical, check_version, parse_bounded, sha256
from merge_core.errors import CorruptCheckpoint, InvalidRecipe
from merge_core.operators import COPY, find
from merge_core.operators.base import Operator, Parameter, Value
from merge_core.tokenizer.plan import TokenizerPlan
from merge_core.tokenizer.templates import MAX_TEMPLATE

MAX_PLAN = 64 << 20
MAX_INPUTS = 65
MAX_STEPS = 64
MAX_TAKEN = 1 << 16
"""Pieces of inputs that may be read to compute one piece of a tensor: rounds upon rounds multiply."""
MAX_ROW = 1 << 22
"""Elements of a row where an operator ranks within rows: each piece of a row takes all of it."""
PIECE = 1 << 19
"""Elements that a round computes at least where one is asked for: those of a chunk."""
MAX_CONFIG_CHANGES = 1 << 20
"""Characters of JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """One input of a tensor: `source` counts the plan's inputs, then the results of its earlier steps."""

    source: int
    tensor: str


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """How one tensor of the output is made.

    `operands` have the base first where the operator needs one. A parameter that each expert has for itself
    is a tuple in the order of the experts.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    operator: str
    operands: tuple[Operand, ...]
    parameters: Mapping[str, Value]

    @cached_property
    def info(self) -> TensorInfo:
        """The type and shape of the output."""
        return TensorInfo(dtype=self.dtype, shape=self.shape)

    @property
    def row(self) -> int:
        """The number of elements of a row: the last dimension of a matrix, all of a vector; at least one."""
        return max(1, self.shape[-1] if len(self.shape) > 1 else prod(self.shape))

    @property
    def fault(self) -> str | None:
        """Why the tensor cannot be made as planned, whatever the values of the inputs, or None."""
        operator = find(self.operator)
        if operator.rows and self.row > MAX_ROW:
            return f"{self.operator} ranks within rows of at most {MAX_ROW} elements, not {self.row}"
        return operator.conflict(self.parameters)

    @property
    def experts(self) -> int:
        """The number of operands that are not the base."""
        return len(self.operands) - find(self.operator).needs_base


@dataclass(frozen=True, kw_only=True)
class Step:
    """One merge of a plan; `base` and `donor` count sources as operands do, `tensors` are sorted by name.

    `base` is what all task vectors start from, None where there are none or slices have bases of their own.
    Config, tokenizer and chat template are the donor's, but for the keys of `config`, which replace those of
    its config.json, and `chat_template`, which replaces its template. With `tokenizer` the tokens are chosen,
    and the rows of embeddings follow them.
    """

    base: int | None
    donor: int
    architecture: str
    tensors: tuple[TensorPlan, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    tokenizer: TokenizerPlan | None = None

    @cached_property
    def layout(self) -> Mapping[str, TensorInfo]:
        """The tensors of the output by name: what a CheckpointWriter is created with."""
        return {t.name: t.info for t in self.tensors}

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(t.info.length for t in self.tensors)

    @property
    def dtype(self) -> str:
        """The element type of most of the output's floating-point bytes: what its config states."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors:
            if tensor.dtype in dtypes.MERGEABLE:
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.info.length
        return max(sizes, key=lambda name: (sizes[name], name), default="F32")


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """A merge in full: every model it reads, in order, and its steps; the last one makes the result."""

    inputs: tuple[ModelId, ...]
    steps: tuple[Step, ...]

    @property
    def result(self) -> Step:
        """The step that makes the output."""
        return self.steps[-1]

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """The tensors of the output."""
        return self.result.tensors

    @property
    def layout(self) -> Mapping[str, TensorInfo]:
        """The tensors of the output by name."""
        return self.result.layout

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors of the output."""
        return self.result.output_bytes

    @property
    def base(self) -> int | None:
        """The input that the result's task vectors start from; None where there is no such input."""
        base = self.result.base
        return base if base is not None and base < len(self.inputs) else None

    @property
    def operators(self) -> tuple[str, ...]:
        """The names of the operators of all steps, sorted, without what only copies tensors."""
        return tuple(sorted({t.operator for step in self.steps for t in step.tensors} - {COPY.name}))

    @cached_property
    def origins(self) -> Mapping[str, tuple[int, ...]]:
        """The inputs that each tensor of the result is made of, through all steps, in the order of use."""
        made: list[dict[str, tuple[int, ...]]] = []
        for step in self.steps:
            made.append({tensor.name: self._taken(tensor, made) for tensor in step.tensors})
        return made[-1]

    def _taken(self, tensor: TensorPlan, made: Sequence[Mapping[str, tuple[int, ...]]]) -> tuple[int, ...]:
        taken: dict[int, None] = {}
        for operand in tensor.operands:
            step = operand.source - len(self.inputs)
            taken |= dict.fromkeys((operand.source,) if step < 0 else made[step][operand.tensor])
        return tuple(taken)

    @cached_property
    def digest(self) -> Digest:
        """The plan's name."""
        return sha256(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The canonical bytes."""
        return self._encoded

    @cached_property
    def _encoded(self) -> bytes:
        return canonical(
            {"version": 2, "inputs": list(self.inputs), "steps": [_write_step(step) for step in self.steps]}
        )

    @classmethod
    def parse(cls, data: bytes) -> MergePlan:
        """Read a plan that may come from anybody; raises CorruptCheckpoint on whatever is not exact."""
        if len(data) > MAX_PLAN:
            raise CorruptCheckpoint(f"a plan of {len(data)} bytes; at most {MAX_PLAN} are read")
        try:
            plan = _plan(parse_bounded(data))
            if plan.to_bytes() != data:
                raise ValueError("it is not spelled as a plan is")
            return plan
        except InvalidRecipe as error:
            raise CorruptCheckpoint(
                f"not a merge plan for this weft: {error.why}", hint=error.hint
            ) from error
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            raise CorruptCheckpoint(f"not a merge plan: {error}", hint="ask for the plan again") from error


def most_taken(inputs: int, steps: Sequence[Step]) -> int:
    """How many pieces of inputs, counted as often as they are read, one piece of a plan takes at most."""
    made: list[dict[str, tuple[TensorPlan, int]]] = []
    for step in steps:
        gathered = frozenset(step.tokenizer.tensors if step.tokenizer else ())
        counts: dict[str, tuple[TensorPlan, int]] = {}
        for tensor in step.tensors:
            total = 0
            for operand in tensor.operands:
                if operand.source < inputs:
                    total += 1
                else:
                    given, count = made[operand.source - inputs][operand.tensor]
                    total += count * _reach(tensor, given, gathered=tensor.name in gathered)
            counts[tensor.name] = tensor, total
        made.append(counts)
    return max((count for counts in made for _, count in counts.values()), default=0)


def _reach(taker: TensorPlan, given: TensorPlan, *, gathered: bool) -> int:
    """How often a piece of what an earlier step makes is computed, at most, for a piece of what takes it."""
    leaves, reach = merkle.leaf_count(given.info.length), 1
    if gathered:
        width = max(1, prod(given.shape[1:]))
        rows, each = PIECE // width + 2, width * dtypes.SIZES[given.dtype] // merkle.LEAF_SIZE + 2
        reach = min(leaves, rows * each)
    if find(taker.operator).rows and PIECE % taker.row:
        reach *= min(leaves, 2 * taker.row // PIECE + 3)
    if taker.operator == COPY.name != given.operator:
        # Leaf by leaf, of which a piece of a wide type has several.
        reach *= min(leaves, PIECE * dtypes.SIZES[given.dtype] // merkle.LEAF_SIZE)
    return reach


def _write_step(step: Step) -> dict[str, Any]:
    value: dict[str, Any] = {
        "base": step.base,
        "donor": step.donor,
        "architecture": step.architecture,
        "tensors": [_write_tensor(tensor) for tensor in step.tensors],
    }
    if step.config:
        value["config"] = dict(step.config)
    if step.chat_template is not None:
        value["chatTemplate"] = step.chat_template
    if step.tokenizer is not None:
        value["tokenizer"] = step.tokenizer.to_value()
    return value


def _write_tensor(tensor: TensorPlan) -> dict[str, Any]:
    """An operand of the tensor's own name is a number, any other [number, name]."""
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "operator": tensor.operator,
        "operands": [o.source if o.tensor == tensor.name else [o.source, o.tensor] for o in tensor.operands],
        "parameters": {name: _write(value) for name, value in tensor.parameters.items()},
    }


def _write(value: Value) -> Any:
    if isinstance(value, tuple):
        return [float(item).hex() for item in value]
    return value if isinstance(value, bool) else float(value).hex()


def _plan(value: Any) -> MergePlan:
    _keys(value, {"version", "inputs", "steps"})
    check_version(value["version"], 2, "plan")
    inputs, steps = value["inputs"], value["steps"]
    if not isinstance(inputs, list) or not 1 <= len(inputs) <= MAX_INPUTS:
        raise ValueError("the list of inputs")
    if not isinstance(steps, list) or not 1 <= len(steps) <= MAX_STEPS:
        raise ValueError("the list of steps")
    if sum(len(step["tensors"]) for step in steps) > MAX_TENSORS:
        raise ValueError(f"more than {MAX_TENSORS} tensors")
    made: list[Step] = []
    for step in steps:
        made.append(_step(step, len(inputs), made))
    if most_taken(len(inputs), made) > MAX_TAKEN:
        raise ValueError(f"one tensor takes more than {MAX_TAKEN} of the inputs")
    return MergePlan(inputs=tuple(ModelId(item) for item in inputs), steps=tuple(made))


def _step(value: Any, inputs: int, earlier: Sequence[Step]) -> Step:
    """A step that may take from so many inputs and from the steps before it."""
    _keys(value, {"base", "donor", "architecture", "tensors"}, {"config", "chatTemplate", "tokenizer"})
    architecture, template = value["architecture"], value.get("chatTemplate")
    if not isinstance(architecture, str) or not 0 < len(architecture) <= 128:
        raise ValueError("the architecture")
    if template is not None and not (isinstance(template, str) and len(template) <= MAX_TEMPLATE):
        raise ValueError("the chat template")
    if not isinstance(value["tensors"], list) or not value["tensors"]:
        raise ValueError("the list of tensors")
    sources = inputs + len(earlier)
    base = None if value["base"] is None else _index(value["base"], sources)
    tensors = tuple(_tensor(item, sources, base) for item in value["tensors"])
    if any(a.name >= b.name for a, b in pairwise(tensors)):
        raise ValueError("the tensors are not sorted by name, or one is repeated")
    for operand in (operand for tensor in tensors for operand in tensor.operands):
        if operand.source >= inputs and operand.tensor not in earlier[operand.source - inputs].layout:
            raise ValueError(f"step {operand.source - inputs} makes no {operand.tensor}")
    return Step(
        base=base,
        donor=_index(value["donor"], sources),
        architecture=architecture,
        tensors=tensors,
        config=_config(value.get("config", {})),
        chat_template=template,
        tokenizer=_tokenizer(value["tokenizer"], tensors, sources) if "tokenizer" in value else None,
    )


def _tokenizer(value: Any, tensors: Sequence[TensorPlan], sources: int) -> TokenizerPlan:
    tokenizer = TokenizerPlan.parse(value, sources)
    fault = tokenizer.fault(tensors)
    if fault:
        raise ValueError(fault)
    return tokenizer


def _config(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or len(json.dumps(value)) > MAX_CONFIG_CHANGES:
        raise ValueError("the changes of the config")
    if odd := [key for key in value if key.removeprefix(f"{NESTED}.") not in CHANGED]:
        raise ValueError(f"no merge changes {odd[0][:80]!r} of the config")
    return value


def _tensor(item: Any, sources: int, base: int | None) -> TensorPlan:
    _keys(item, {"name", "dtype", "shape", "operator", "operands", "parameters"})
    name, dtype, shape = _name(item["name"]), item["dtype"], item["shape"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"the shape of {name}")
    if any(type(n) is not int or n < 0 for n in shape) or dtypes.byte_length(dtype, shape) >= 2**53:
        raise ValueError(f"the shape of {name}")
    operator = find(item["operator"])
    if operator is not COPY and dtype not in dtypes.MERGEABLE:
        raise ValueError(f"no arithmetic gives {dtype}: {name}")
    operands = tuple(_operand(operand, name, sources) for operand in item["operands"])
    experts = len(operands) - operator.needs_base
    least, most = operator.experts
    if not least <= experts <= (MAX_INPUTS if most is None else most):
        raise ValueError(f"the number of operands of {name}")
    if operator.needs_base and base is not None and operands[0].source != base:
        raise ValueError(f"{name} does not begin with the base")
    tensor = TensorPlan(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        operator=operator.name,
        operands=operands,
        parameters=_parameters(item["parameters"], operator, experts),
    )
    if tensor.fault:
        raise ValueError(f"{name}: {tensor.fault}")
    return tensor


def _operand(item: Any, name: str, sources: int) -> Operand:
    if isinstance(item, list):
        source, tensor = item
        return Operand(source=_index(source, sources), tensor=_name(tensor))
    return Operand(source=_index(item, sources), tensor=name)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not TENSOR_NAME.fullmatch(value):
        raise ValueError(f"tensor name {str(value)[:80]!r}")
    return value


def _parameters(item: Any, operator: Operator, experts: int) -> dict[str, Value]:
    _keys(item, {p.name for p in operator.parameters})
    return {p.name: _value(item[p.name], p, experts) for p in operator.parameters}


def _value(item: Any, declared: Parameter, experts: int) -> Value:
    if declared.each:
        if not isinstance(item, list) or len(item) != experts:
            raise ValueError(f"{declared.name} is not given for each expert")
        return tuple(_number(text, declared) for text in item)
    if declared.flag:
        if not isinstance(item, bool):
            raise ValueError(f"{declared.name} is not true or false")
        return item
    return _number(item, declared)


def _number(text: Any, declared: Parameter) -> float:
    if not isinstance(text, str) or len(text) > 32:
        raise ValueError(f"{declared.name} is not a hex float")
    value = float.fromhex(text)
    if value.hex() != text or value - value != 0.0:
        raise ValueError(f"{declared.name} is not a finite hex float as float.hex writes it")
    fault = declared.fault(value)
    if fault:
        raise ValueError(fault)
    return value


def _index(value: Any, count: int) -> int:
    if type(value) is not int or not 0 <= value < count:
        raise ValueError(f"{str(value)[:20]} is not one of {count} sources")
    return value


def _keys(item: Any, expected: set[str], optional: frozenset[str] | set[str] = frozenset()) -> None:
    if not isinstance(item, dict) or not expected <= item.keys() <= expected | optional:
        raise ValueError(f"expected exactly the keys {sorted(expected)}")


def trace_shape(tensor: TensorPlan) -> Mapping[str, tuple[int, type]]:
    """What the Trace must hold for a tensor: name -> number of values, int or float."""
    return find(tensor.operator).traces(tensor.parameters, tensor.experts)
