"""Resolution: a recipe against the headers of its models, before a byte of weights moves.

    check(recipe, headers)   every incompatibility at once, and what the merge will cost; needs headers only
    draft(recipe, headers)   a Draft with its Estimate, or Unmergeable
    draft.seal(model_ids)    the MergePlan: inputs by ModelId, every parameter of every tensor

Names and shapes decide what can be merged; there is no table of architectures. The output has the tensors of
the donor (the base, else the first model).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_core.checkpoint import dtypes
from merge_core.checkpoint.layout import layer_count, place
from merge_core.checkpoint.manifest import FileRecord, Manifest
from merge_core.checkpoint.reader import Checkpoint, architecture_of, file_record
from merge_core.checkpoint.source import TensorInfo
from merge_core.config_keys import dropped
from merge_core.digest import ModelId
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.operators import COPY, find
from merge_core.operators.base import Value
from merge_core.plan import CHUNK_ELEMENTS, THREADS, MergePlan, Operand, Step, TensorPlan
from merge_core.recipe import Recipe

MAX_PROBLEMS = 200

_RUNTIME_BYTES = 300 << 20

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
class Draft:
    """A plan whose inputs are still references (`models`, in order); `seal` names them by ModelId."""

    models: tuple[str, ...]
    steps: tuple[Step, ...]
    estimate: Estimate

    def seal(self, model_ids: Mapping[str, ModelId]) -> MergePlan:
        """The MergePlan; raises KeyError where the id of a reference is missing."""
        return MergePlan(inputs=tuple(model_ids[model] for model in self.models), steps=self.steps)


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
        infos = [headers[models[o.source]].tensors[o.tensor] for o in tensor.operands]
        length = sum(info.length for info in infos)
        reading += length * (1 + find(tensor.operator).passes)
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
    step = Step(
        base=None if recipe.base is None else models.index(recipe.base),
        donor=models.index(recipe.donor),
        architecture=architecture_of(headers[recipe.donor].config),
        tensors=tuple(resolved.tensors),
    )
    return Draft(models=models, steps=(step,), estimate=_estimate(recipe, headers, resolved, THREADS))


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
                    operator=COPY.name,
                    operands=(Operand(source=self._models.index(self._recipe.donor), tensor=name),),
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
        taken = recipe.experts
        if recipe.operator.needs_base and recipe.base is not None:
            taken = (recipe.base, *taken)
        self.tensors.append(
            TensorPlan(
                name=name,
                dtype=recipe.out_dtype or recipe.dtype or donor.dtype,
                shape=donor.shape,
                operator=recipe.operator.name,
                operands=tuple(Operand(source=self._models.index(m), tensor=name) for m in taken),
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
