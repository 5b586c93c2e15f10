"""One merge against the headers of its models: the plan of each tensor, or what stands against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from merge_core.checkpoint import dtypes
from merge_core.checkpoint.reader import architecture_of
from merge_core.checkpoint.source import TensorInfo
from merge_core.config_keys import NESTED, dropped
from merge_core.errors import CorruptCheckpoint, Unmergeable
from merge_core.operators import COPY
from merge_core.operators.base import Value
from merge_core.operators.passthrough import PASSTHROUGH
from merge_core.plan import Operand, Step, TensorPlan
from merge_core.recipe import Merge
from merge_core.resolve.head import TIE, head_of
from merge_core.resolve.header import ModelHeader
from merge_core.resolve.layers import Chosen, changes
from merge_core.resolve.sites import Site, Sites
from merge_core.resolve.stack import Stack, stack_of
from merge_core.resolve.tokens import Tokens, tokens_of
from merge_core.tokenizer.templates import written_out
from merge_core.tokenizer.union import Files

# Keys that change what equal shapes mean, and keys that change it a little.
_MUST_AGREE = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "hidden_act")
_SHOULD_AGREE = ("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "layer_norm_eps")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")


class Merging:
    """A walk over the models and tensors of one merge that collects problems, warnings and tensor plans.

    `sources` numbers the models as operands do; `files` are those of every number so far. Of whole models
    some may lack a header, but not the donor: what can be said of the others is said.
    """

    def __init__(
        self,
        merge: Merge,
        headers: Mapping[str, ModelHeader],
        sources: Mapping[str, int],
        files: Sequence[Files],
    ) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.tensors: list[TensorPlan] = []
        self._merge = merge
        self._headers = {model: headers[model] for model in merge.models if model in headers}
        self._sources = sources
        self._files = files
        self._donor = headers[merge.donor]
        self._head = head_of(self._headers)
        self._stacks = {model: self._stack(model) for model in self._headers}
        self._config: dict[str, Any] = {}
        self._tokens: Tokens | None = None
        self._template: str | None = None
        self._with_rows: set[str] = set()

    def run(self) -> None:
        """Do the walk."""
        for model, header in self._headers.items():
            self._compare_configs(model, header)
        if lost := dropped(self._donor.config):
            self.warnings.append(f"config keys of {self._merge.donor} that are not kept: {', '.join(lost)}")
        self._tie()
        self._read_tokenizers()
        sites = Sites(self._merge, self._stacks, self.problems.append)
        for site in sites.find():
            self._resolve(site)
        if sites.layers:
            chosen = [self._chosen(model, number) for model, number in sites.layers]
            donor = self._chosen(self._merge.donor, 0)
            self._config |= changes(donor, chosen, self.problems.append, self.warnings.append)
        if not self.tensors and not self.problems:
            self.problems.append(f"{self._merge.donor} has no tensors")
        if self._tokens is not None and not self.problems:
            self.problems += self._tokens.faults(self._made_with_rows, self.tensors)

    def step(self) -> Step:
        """The step, once there are no problems."""
        return Step(
            base=self._base,
            donor=self._sources[self._merge.donor],
            architecture=architecture_of(self._donor.config),
            tensors=tuple(self.tensors),
            config=self._config,
            chat_template=self._template,
            tokenizer=None if self._tokens is None else self._tokens.plan(self._made_with_rows),
        )

    @property
    def _made_with_rows(self) -> list[str]:
        return [tensor.name for tensor in self.tensors if tensor.name in self._with_rows]

    @property
    def _base(self) -> int | None:
        base = self._merge.single_base
        return None if base is None else self._sources[base]

    def _compare_configs(self, model: str, header: ModelHeader) -> None:
        try:
            architecture_of(header.config)
        except CorruptCheckpoint as error:
            self.problems.append(f"{model}: {error.why}")
        if "quantization_config" in header.config:
            self.problems.append(f"{model} is quantised; merging needs its weights in a floating-point type")
        if header is self._donor:
            return
        for key in (*_MUST_AGREE, "architectures", *_SHOULD_AGREE):
            mine, theirs = header.stated(key), self._donor.stated(key)
            by_layer = key in _MUST_AGREE and isinstance(mine, list) and isinstance(theirs, list)
            if mine != theirs and not (by_layer and not self._merge.is_whole):
                line = f"{key} of {model} is {_short(mine)}, of {self._merge.donor} it is {_short(theirs)}"
                (self.warnings if key in _SHOULD_AGREE else self.problems).append(line)
        if self._merge.tokenizer is not None:
            return
        tokens = {f.path: f.sha256 for f in self._donor.files if f.path in _TOKENIZERS}
        if tokens != {f.path: f.sha256 for f in header.files if f.path in _TOKENIZERS}:
            self.warnings.append(
                f"the tokenizer of {model} differs from that of {self._merge.donor}: "
                "embeddings are merged row by row all the same"
            )

    def _tie(self) -> None:
        """Untie the output where some input is untied."""
        if self._head is None or not self._head.is_stored:
            return
        tied = ", ".join(self._head.embeddings)
        self.warnings.append(
            f"{self._head.name} is stored, for not all tie it: the embedding of {tied} stands in for it"
        )
        nested = self._donor.config.get(NESTED)
        if TIE not in self._donor.config and isinstance(nested, Mapping) and TIE in nested:
            self._config[f"{NESTED}.{TIE}"] = False
        elif self._donor.config.get(TIE) is not False:
            self._config[TIE] = False

    def _chosen(self, model: str, number: int) -> Chosen:
        config, count = self._headers[model].config, self._stacks[model].count
        return Chosen(model=model, config=config, count=count, number=number)

    def _read_tokenizers(self) -> None:
        """Settle which tokens and which chat template the output has, where the recipe says."""
        merge = self._merge
        if len(self._headers) < len(merge.models):
            return
        models = {model: self._sources[model] for model in merge.models}
        try:
            if merge.tokenizer is not None:
                self._tokens = tokens_of(
                    merge.tokenizer, models, self._headers, self._files, base=self._base, donor=merge.donor
                )
                self._config |= self._tokens.config
                self.warnings += self._tokens.warnings
            if merge.chat_template is not None:
                contents = [header.contents for header in self._headers.values()]
                self._template = written_out(merge.chat_template, contents)
        except (Unmergeable, CorruptCheckpoint) as error:
            self.problems.append(error.why)

    def _stack(self, model: str) -> Stack:
        """The names of a model, with the head as the output has it."""
        stack, head = stack_of(self._headers[model]), self._head
        if head is None:
            return stack
        has = head.is_stored and (model in head.embeddings or head.name in stack.after)
        return replace(stack, after=stack.after - {head.name} | ({head.name} if has else set()))

    def _resolve(self, site: Site) -> None:
        """Plan one tensor, or say why it cannot be merged."""
        part = site.part
        stored = [self._stored(i.model, n) for i, n in zip(part.operands, site.names, strict=True)]
        if any(name is None for name in stored):
            self._tell_missing(site, stored)
            return
        operands = [(i.model, n) for i, n in zip(part.operands, stored, strict=True) if n is not None]
        infos = [self._info(site, model, name) for model, name in operands]
        if len({info.shape for info in infos}) > 1:
            listed = ", ".join(
                f"{_label(model, name, site.name)} {list(info.shape)}"
                for (model, name), info in zip(operands, infos, strict=True)
            )
            self.problems.append(f"the shapes of {site.name} differ: {listed}")
            return
        types = {info.dtype for info in infos}
        if types <= dtypes.MERGEABLE:
            self._plan(site, operands, infos)
        elif len(types) == 1:
            self._copy(site, operands[part.leader], infos[part.leader])
            if len(infos) > 1:
                leader = part.operands[part.leader].model
                self.warnings.append(f"{site.name} is {infos[0].dtype}: taken from {leader} as it is")
        else:
            listed = ", ".join(
                f"{_label(model, name, site.name)} {info.dtype}"
                for (model, name), info in zip(operands, infos, strict=True)
            )
            self.problems.append(f"{site.name} cannot be merged in these types: {listed}")

    def _stored(self, model: str, name: str) -> str | None:
        """The tensor of a model that is meant by a name: its embedding for a tied head; None without any."""
        if self._head is not None and name == self._head.name and model in self._head.embeddings:
            return self._head.embeddings[model]
        return name if name in self._headers[model].tensors else None

    def _info(self, site: Site, model: str, name: str) -> TensorInfo:
        """The type and shape of an operand, with the rows of the output where it has one for each token."""
        info = self._headers[model].tensors[name]
        if self._tokens is None or name not in self._tokens.by_model[model]:
            return info
        self._with_rows.add(site.name)
        return replace(info, shape=(self._tokens.settled.rows, *info.shape[1:]))

    def _tell_missing(self, site: Site, stored: Sequence[str | None]) -> None:
        leader = site.part.leader
        has = "" if stored[leader] is None else f", which {site.part.operands[leader].model} has"
        for item, name, found in zip(site.part.operands, site.names, stored, strict=True):
            if found is None:
                self.problems.append(f"{item.model} lacks the tensor {name}{has}")

    def _plan(self, site: Site, operands: Sequence[tuple[str, str]], infos: Sequence[TensorInfo]) -> None:
        operator, leader = site.part.operator, site.part.leader
        parameters = self._parameters(site)
        if parameters is None:
            return
        dtype = self._merge.out_dtype or self._merge.dtype or infos[leader].dtype
        if operator is PASSTHROUGH and parameters["scale"] == (1.0,) and dtype == infos[0].dtype:
            self._copy(site, operands[0], infos[0])
            return
        tensor = TensorPlan(
            name=site.name,
            dtype=dtype,
            shape=infos[leader].shape,
            operator=operator.name,
            operands=tuple(Operand(source=self._sources[m], tensor=name) for m, name in operands),
            parameters=parameters,
        )
        if tensor.fault:
            self.problems.append(f"{tensor.fault} for {site.name}")
        else:
            self.tensors.append(tensor)

    def _parameters(self, site: Site) -> dict[str, Value] | None:
        """Every parameter of a tensor; None, and a problem, where one is open or they do not fit."""
        part = site.part
        found = tuple(text in name for name in (site.name, *site.names) for text in part.filters)
        if (site.depth, found) not in part.resolved:
            parameters = self._resolved(site)
            if parameters is None:
                return None
            part.resolved[site.depth, found] = parameters
        return part.resolved[site.depth, found]

    def _resolved(self, site: Site) -> dict[str, Value] | None:
        part, merge = site.part, self._merge
        experts = list(zip(part.operands, site.names, strict=True))[part.operator.needs_base :]
        parameters: dict[str, Value] = {}
        for declared in part.operator.parameters:
            if declared.each:
                values = [merge.value(declared.name, part.slice, i, n, site.depth) for i, n in experts]
            else:
                values = [merge.value(declared.name, part.slice, None, site.name, site.depth)]
            numbers = [value for value in values if value is not None and not isinstance(value, tuple)]
            if len(numbers) < len(values):
                missing = [i for (i, _), value in zip(experts, values, strict=False) if value is None]
                whose = f" of {', '.join(i.model for i in missing)}" if declared.each else ""
                told = [
                    merge.speaks_of(declared.name, part.slice, i if declared.each else None) for i in missing
                ]
                where = f" for {site.name}" if any(told) else ""
                problem = f"the recipe gives no {declared.name}{whose}{where}"
                if problem not in self.problems:
                    self.problems.append(problem)
                return None
            parameters[declared.name] = tuple(map(float, numbers)) if declared.each else numbers[0]
        return parameters

    def _copy(self, site: Site, operand: tuple[str, str], info: TensorInfo) -> None:
        model, name = operand
        self.tensors.append(
            TensorPlan(
                name=site.name,
                dtype=info.dtype,
                shape=info.shape,
                operator=COPY.name,
                operands=(Operand(source=self._sources[model], tensor=name),),
                parameters={},
            )
        )


def _label(model: str, name: str, output: str) -> str:
    return model if name == output else f"{model} ({name})"


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
