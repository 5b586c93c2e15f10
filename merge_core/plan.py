"""The MergePlan: a recipe resolved against checkpoints, with canonical bytes and a digest.

    check(recipe, headers)   every incompatibility at once, and what the merge will cost; needs headers only
    draft(recipe, headers)   a Draft with its Estimate, or Unmergeable
    draft.seal(model_ids)    the MergePlan: inputs by ModelId, every parameter of every tensor

A plan names no holder and no path, so two people who write the same recipe over the same models get the same
plan, and the same result. `MergePlan.parse(plan.to_bytes()) == plan`.

Names and shapes decide what can be merged; there is no table of architectures. The output has the tensors of
the donor (the base, else the first model).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from merge_core.checkpoint import dtypes
from merge_core.checkpoint.layout import layer_count, place
from merge_core.checkpoint.manifest import MAX_DIMENSIONS, MAX_TENSORS, TENSOR_NAME, FileRecord, Manifest
from merge_core.checkpoint.reader import Checkpoint, architecture_of, file_record
from merge_core.checkpoint.source import TensorInfo
from merge_core.config_keys import dropped
from merge_core.digest import Digest, ModelId, canonical, check_version, parse_canonical, sha256
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.operators import OPERATORS
from merge_core.operators.base import Operator, Parameter, Value
from merge_core.recipe import DTYPES, MAX_MODELS, Recipe

MAX_PLAN = 64 << 20
MAX_PROBLEMS = 200

CHUNK_ELEMENTS = 1 << 19
"""Elements that are in work at once per thread: whole leaves of every type that arithmetic is defined on."""

_RUNTIME_BYTES = 300 << 20
THREADS = 2
"""Threads of a merge unless it is told otherwise."""

# Keys that change what equal shapes mean, and keys that change it a little.
_MUST_AGREE = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "hidden_act")
_SHOULD_AGREE = ("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "layer_norm_eps")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
# Tables that some exporters store and every loader computes for itself.
_DERIVED = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attention.masked_bias")
_TIED = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelHeader:
    """What is known of a model without its weights."""

    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    files: tuple[FileRecord, ...]


def header_of(checkpoint: Checkpoint) -> ModelHeader:
    """The header of a checkpoint on disk."""
    files = checkpoint.functional_files()
    return ModelHeader(
        tensors=checkpoint.tensors,
        config=checkpoint.config,
        files=tuple(file_record(name, data) for name, data in files.items()),
    )


def header_of_manifest(manifest: Manifest, config: Mapping[str, Any]) -> ModelHeader:
    """The header of a model that lies elsewhere; `config` is its parsed config.json."""
    tensors = {t.name: TensorInfo(dtype=t.dtype, shape=t.shape) for t in manifest.tensors}
    return ModelHeader(tensors=tensors, config=config, files=manifest.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What checking a recipe found; sizes in bytes, upper bounds for memory and reading.

    A merge with `problems` cannot be done; `warnings` are for the person to judge.
    """

    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    tensors: int
    output_bytes: int
    peak_ram_bytes: int
    read_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """How one tensor of the output is made.

    `inputs` are indices into the plan's inputs, the base first where the operator needs one. A parameter that
    each expert has for itself is a tuple in the order of the experts.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    operator: str
    inputs: tuple[int, ...]
    parameters: Mapping[str, Value]

    @property
    def info(self) -> TensorInfo:
        """The type and shape of the output."""
        return TensorInfo(dtype=self.dtype, shape=self.shape)

    @property
    def experts(self) -> int:
        """The number of inputs that are not the base."""
        return len(self.inputs) - OPERATORS[self.operator].needs_base


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """A merge in full: `inputs` in order, `donor` the index of the model whose config and tokenizer it takes.

    `base` is the index of the base or None; `tensors` are sorted by name.
    """

    inputs: tuple[ModelId, ...]
    base: int | None
    donor: int
    architecture: str
    tensors: tuple[TensorPlan, ...]

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

    @cached_property
    def digest(self) -> Digest:
        """The plan's name."""
        return sha256(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The canonical bytes."""
        return canonical(
            {
                "version": 1,
                "inputs": list(self.inputs),
                "base": self.base,
                "donor": self.donor,
                "architecture": self.architecture,
                "tensors": [
                    {
                        "name": t.name,
                        "dtype": t.dtype,
                        "shape": list(t.shape),
                        "operator": t.operator,
                        "inputs": list(t.inputs),
                        "parameters": {name: _write(value) for name, value in t.parameters.items()},
                    }
                    for t in self.tensors
                ],
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> MergePlan:
        """Read a plan that may come from anybody; raises CorruptCheckpoint on whatever is not exact."""
        if len(data) > MAX_PLAN:
            raise CorruptCheckpoint(f"a plan of {len(data)} bytes; at most {MAX_PLAN} are read")
        try:
            return _plan(parse_canonical(data))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise CorruptCheckpoint(f"not a merge plan: {error}", hint="ask for the plan again") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A plan whose inputs are still references (`models`, in order); `seal` names them by ModelId."""

    models: tuple[str, ...]
    base: int | None
    donor: int
    architecture: str
    tensors: tuple[TensorPlan, ...]
    estimate: Estimate

    def seal(self, model_ids: Mapping[str, ModelId]) -> MergePlan:
        """The MergePlan; raises KeyError where the id of a reference is missing."""
        return MergePlan(
            inputs=tuple(model_ids[model] for model in self.models),
            base=self.base,
            donor=self.donor,
            architecture=self.architecture,
            tensors=self.tensors,
        )


def check(recipe: Recipe, headers: Mapping[str, ModelHeader], *, threads: int = THREADS) -> Estimate:
    """Report everything that stands against a merge, and what it costs; never raises for a bad model."""
    resolved = _Resolution(recipe, headers)
    resolved.run()
    return _estimate(recipe, headers, resolved, threads)


def _estimate(
    recipe: Recipe, headers: Mapping[str, ModelHeader], resolved: _Resolution, threads: int
) -> Estimate:
    tensors = resolved.tensors
    models = recipe.models
    reading = peak = 0
    for tensor in tensors:
        infos = [headers[models[i]].tensors[tensor.name] for i in tensor.inputs]
        length = sum(info.length for info in infos)
        reading += length * (1 + OPERATORS[tensor.operator].passes)
        # Every input raw and as float32, and the kernel's temporaries; results wait in the queue.
        elements = min(CHUNK_ELEMENTS, max(1, infos[0].length // dtypes.SIZES[infos[0].dtype]))
        peak = max(peak, threads * elements * (8 * len(infos) + 4 * (len(infos) + 8)))
    return Estimate(
        problems=resolved.problems,
        warnings=tuple(resolved.warnings),
        tensors=len(tensors),
        output_bytes=sum(t.info.length for t in tensors),
        peak_ram_bytes=_RUNTIME_BYTES + peak,
        read_bytes=reading,
    )


def draft(recipe: Recipe, headers: Mapping[str, ModelHeader]) -> Draft:
    """Resolve a recipe; raises Unmergeable with every incompatibility in `problems`."""
    resolved = _Resolution(recipe, headers)
    resolved.run()
    if resolved.problems:
        more = len(resolved.problems) - 1
        raise Unmergeable(
            resolved.problems[0] + (f" (and {more} more)" if more else ""),
            problems=resolved.problems,
            hint="choose models of one architecture, then: weft plan RECIPE",
        )
    models = recipe.models
    return Draft(
        models=models,
        base=None if recipe.base is None else models.index(recipe.base),
        donor=models.index(recipe.donor),
        architecture=architecture_of(headers[recipe.donor].config),
        tensors=tuple(resolved.tensors),
        estimate=_estimate(recipe, headers, resolved, THREADS),
    )


class _Resolution:
    """One walk over all models and tensors that collects problems and tensor plans."""

    def __init__(self, recipe: Recipe, headers: Mapping[str, ModelHeader]) -> None:
        self._recipe = recipe
        self._models = recipe.models
        self._headers = {m: headers[m] for m in self._models if m in headers}
        self._found: list[str] = []
        self.warnings: list[str] = []
        self.tensors: list[TensorPlan] = []

    @property
    def problems(self) -> tuple[str, ...]:
        """What was found, at most MAX_PROBLEMS lines."""
        rest = len(self._found) - MAX_PROBLEMS
        return tuple(self._found[:MAX_PROBLEMS]) + ((f"and {rest} problems more",) if rest > 0 else ())

    def run(self) -> None:
        for model in self._models:
            if model not in self._headers:
                role = "the base " if model == self._recipe.base else ""
                self._found.append(f"{role}{model} was not found")
        donor = self._headers.get(self._recipe.donor)
        if donor is None:
            return
        for model, header in self._headers.items():
            self._compare_configs(model, header, donor)
            self._compare_names(model, header, donor)
        if lost := dropped(donor.config):
            self.warnings.append(f"config keys of {self._recipe.donor} that are not kept: {', '.join(lost)}")
        layers = layer_count(donor.config) or 1 + max(
            (place(name).layer or 0 for name in donor.tensors), default=0
        )
        for item in self._recipe.inputs:
            if item.layer_range not in (None, (0, layers)):
                self._found.append(f"{item.model}: layer_range must cover all layers, [0, {layers}]")
        for name in sorted(donor.tensors):
            self._resolve(name, layers)
        if not self.tensors and not self._found:
            self._found.append(f"{self._recipe.donor} has no tensors")

    def _compare_configs(self, model: str, header: ModelHeader, donor: ModelHeader) -> None:
        try:
            architecture_of(header.config)
        except CorruptCheckpoint as error:
            self._found.append(f"{model}: {error.why}")
        if "quantization_config" in header.config:
            self._found.append(f"{model} is quantised; merging needs its weights in a floating-point type")
        if header is donor:
            return
        for key in (*_MUST_AGREE, "architectures", *_SHOULD_AGREE):
            mine, theirs = header.config.get(key), donor.config.get(key)
            if mine != theirs:
                line = f"{key} of {model} is {_short(mine)}, of {self._recipe.donor} it is {_short(theirs)}"
                (self.warnings if key in _SHOULD_AGREE else self._found).append(line)
        tokens = {f.path: f.sha256 for f in donor.files if f.path in _TOKENIZERS}
        if tokens != {f.path: f.sha256 for f in header.files if f.path in _TOKENIZERS}:
            self.warnings.append(
                f"the tokenizer of {model} differs from that of {self._recipe.donor}: "
                "embeddings are merged row by row all the same"
            )

    def _compare_names(self, model: str, header: ModelHeader, donor: ModelHeader) -> None:
        for name in sorted(donor.tensors.keys() - header.tensors.keys()):
            self._found.append(f"{model} lacks the tensor {name}, which {self._recipe.donor} has")
        for name in sorted(header.tensors.keys() - donor.tensors.keys()):
            copy = name == _TIED and header.config.get("tie_word_embeddings") is True
            if not copy and not name.endswith(_DERIVED):
                self._found.append(f"{model} has the tensor {name}, which {self._recipe.donor} lacks")

    def _resolve(self, name: str, layers: int) -> None:
        """Plan one tensor, or say why it cannot be merged."""
        have = {m: h.tensors[name] for m, h in self._headers.items() if name in h.tensors}
        shapes = {info.shape for info in have.values()}
        if len(shapes) > 1:
            listed = ", ".join(f"{m} {list(info.shape)}" for m, info in have.items())
            self._found.append(f"the shapes of {name} differ: {listed}")
            return
        if len(have) < len(self._models):
            return
        types = {info.dtype for info in have.values()}
        donor = have[self._recipe.donor]
        if types <= dtypes.MERGEABLE:
            self._plan(name, donor, layers)
        elif len(types) == 1:
            self.tensors.append(
                TensorPlan(
                    name=name,
                    dtype=donor.dtype,
                    shape=donor.shape,
                    operator="passthrough",
                    inputs=(self._models.index(self._recipe.donor),),
                    parameters={},
                )
            )
            if len(self._models) > 1:
                self.warnings.append(f"{name} is {donor.dtype}: taken from {self._recipe.donor} as it is")
        else:
            listed = ", ".join(f"{m} {info.dtype}" for m, info in have.items())
            self._found.append(f"{name} cannot be merged in these types: {listed}")

    def _plan(self, name: str, donor: TensorInfo, layers: int) -> None:
        recipe = self._recipe
        depth = _depth(name, layers)
        parameters: dict[str, Value] = {}
        for declared in recipe.operator.parameters:
            values = [
                recipe.value(declared.name, model, name, depth)
                for model in (recipe.experts if declared.each else (None,))
            ]
            if any(value is None for value in values):
                missing = [m for m, value in zip(recipe.experts, values, strict=False) if value is None]
                whose = f" of {', '.join(missing)}" if declared.each else ""
                self._found.append(f"the recipe gives no {declared.name}{whose} for {name}")
                return
            numbers = [value for value in values if value is not None and not isinstance(value, tuple)]
            parameters[declared.name] = tuple(map(float, numbers)) if declared.each else numbers[0]
        inputs = tuple(self._models.index(m) for m in recipe.experts)
        if recipe.operator.needs_base and recipe.base is not None:
            inputs = (self._models.index(recipe.base), *inputs)
        self.tensors.append(
            TensorPlan(
                name=name,
                dtype=recipe.out_dtype or recipe.dtype or donor.dtype,
                shape=donor.shape,
                operator=recipe.operator.name,
                inputs=inputs,
                parameters=parameters,
            )
        )


def _depth(name: str, layers: int) -> float:
    """Where a tensor lies between the first layer (0) and the last (1), for gradients.

    What lies outside of the layers counts as 0, the head too: so does mergekit.
    """
    layer = place(name).layer
    if layer is None:
        return 0.0
    return min(layer / (layers - 1), 1.0) if layers > 1 else 1.0


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _write(value: Value) -> Any:
    if isinstance(value, tuple):
        return [float(item).hex() for item in value]
    return value if isinstance(value, bool) else float(value).hex()


def _plan(value: Any) -> MergePlan:
    _keys(value, {"version", "inputs", "base", "donor", "architecture", "tensors"})
    check_version(value["version"], 1, "plan")
    inputs = value["inputs"]
    if not isinstance(inputs, list) or not 1 <= len(inputs) <= MAX_MODELS + 1:
        raise ValueError("the list of inputs")
    if not isinstance(value["architecture"], str) or not 0 < len(value["architecture"]) <= 128:
        raise ValueError("the architecture")
    if not isinstance(value["tensors"], list) or not 1 <= len(value["tensors"]) <= MAX_TENSORS:
        raise ValueError("the list of tensors")
    base = None if value["base"] is None else _index(value["base"], len(inputs))
    tensors = tuple(_tensor(item, len(inputs), base) for item in value["tensors"])
    if any(a.name >= b.name for a, b in pairwise(tensors)):
        raise ValueError("the tensors are not sorted by name, or one is repeated")
    return MergePlan(
        inputs=tuple(ModelId(item) for item in inputs),
        base=base,
        donor=_index(value["donor"], len(inputs)),
        architecture=value["architecture"],
        tensors=tensors,
    )


def _tensor(item: Any, inputs: int, base: int | None) -> TensorPlan:
    _keys(item, {"name", "dtype", "shape", "operator", "inputs", "parameters"})
    name, dtype, shape = item["name"], item["dtype"], item["shape"]
    if not isinstance(name, str) or not TENSOR_NAME.fullmatch(name):
        raise ValueError(f"tensor name {str(name)[:80]!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"the shape of {name}")
    if any(type(n) is not int or n < 0 for n in shape) or dtypes.byte_length(dtype, shape) >= 2**53:
        raise ValueError(f"the shape of {name}")
    operator = OPERATORS[item["operator"]]
    if operator.name != "passthrough" and dtype not in DTYPES.values() and dtype != "F64":
        raise ValueError(f"no arithmetic gives {dtype}: {name}")
    tensor = TensorPlan(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        operator=operator.name,
        inputs=tuple(_index(i, inputs) for i in item["inputs"]),
        parameters={},
    )
    least, most = operator.experts
    if not least <= tensor.experts <= (inputs if most is None else most):
        raise ValueError(f"the number of inputs of {name}")
    if operator.needs_base and tensor.inputs[0] != base:
        raise ValueError(f"{name} does not begin with the base")
    return replace(tensor, parameters=_parameters(item["parameters"], operator, tensor.experts))


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
        raise ValueError(f"{str(value)[:20]} is not one of {count} inputs")
    return value


def _keys(item: Any, expected: set[str]) -> None:
    if not isinstance(item, dict) or set(item) != expected:
        raise ValueError(f"expected exactly the keys {sorted(expected)}")


def trace_shape(tensor: TensorPlan) -> Mapping[str, tuple[int, type]]:
    """What the Trace must hold for a tensor: name -> number of values, int or float."""
    return OPERATORS[tensor.operator].traces(tensor.parameters, tensor.experts)
