"""Weights that a run begins from: what `init.weights` names, the settings that follow from it, a source for each part.

No torch is imported here: the runner reads headers and digests; weights are read by workers, a part at a time.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from stackwise.config import StackWiseConfig
from stackwise.config.adapters import size_faults
from stackwise.config.fields import Section
from stackwise.config.kinds import FeedForward, Kind
from stackwise.config.loading import kind_of
from stackwise.config.model import ArchitectureConfig, ModelConfig
from stackwise.data.prepared import TOKENIZER
from stackwise.data.tokenizer import Tokenizer, bytes_tokenizer
from stackwise.errors import ConfigError, NotFound, UsageError, under
from stackwise.files import expanded
from stackwise.identity import content_id
from stackwise.pipeline.job import Source, Versions, committed_stages
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.schedule import (
    ADAPTER,
    FIRST_HEAD,
    FRONT,
    HEAD,
    adapter_part,
    block_number,
    block_part,
    block_parts,
)
from stackwise.pretrained.adapters import AdapterDirectory, base_of, is_adapter, named_layers
from stackwise.pretrained.checkpoint import Checkpoint
from stackwise.pretrained.families import BLOCK

FREE = frozenset({"dropout", "init_std"})
"""Settings of `model.*` that are no fact of the weights: the run's own value counts."""


class Weights(Protocol):
    """What a run can begin from."""

    model: ModelConfig
    tokenizer_json: Path | None
    objective: str  # the name of the objective that it was trained with, as far as it says
    notes: tuple[str, ...]  # what is to be said of it

    def source(self, part: str, *, hashed: bool = True) -> Source:
        """Where a part's weights are; with their digest, or where it is not asked for perhaps without."""
        ...


class Pretrained(Weights):
    """A checkpoint: a directory of Hugging Face's layout, or an export."""

    def __init__(self, directory: Path, cache_dir: str | None) -> None:
        self.checkpoint = Checkpoint(directory, cache_dir)
        description = self.checkpoint.description
        sizes = {"vocab_size": description.vocab_size, "max_seq_len": description.max_seq_len}
        self.model = ModelConfig.model_validate(description.config.model_dump() | sizes)
        self.tokenizer_json, self.notes = self.checkpoint.tokenizer_json, self.checkpoint.notes
        self.objective = "mlm" if description.masked_head else "clm" if description.causal else "mask_diffusion"

    def source(self, part: str, *, hashed: bool = True) -> Source:
        """See `Weights.source`; a head that is not there starts fresh."""
        if not (names := self.checkpoint.names(part)):
            return Source()
        digest = self.checkpoint.digest(part) if hashed else None
        return Source(str(self.checkpoint.directory), digest, names=names)


class Committed(Weights):
    """A finished run: its committed weights, in the store where they are."""

    notes: tuple[str, ...] = ()

    def __init__(self, run: RunDirectory) -> None:
        config, manifest = run.config(), run.manifest()
        self._versions = committed_stages(run, config, manifest)[-1][1]
        if any(name.startswith(ADAPTER) for name in self._versions):
            raise UsageError(
                f"{run.path} ends with adapters beside its weights",
                hint=f"merge them: `stackwise export --run {run.path} --out DIR`, and begin from DIR",
            )
        sizes = {"vocab_size": manifest["vocabulary"]["size"]}
        sizes["max_seq_len"] = config.model.max_seq_len or config.training.seq_len
        self.model = ModelConfig.model_validate(config.model.model_dump() | sizes)
        self.tokenizer_json: Path | None = Path(manifest["data"]["directory"]) / TOKENIZER
        self.objective = "clm" if config.adapts else config.objective.continued_as or config.objective.name

    def source(self, part: str, *, hashed: bool = True) -> Source:
        return self._versions[part]


class Shallower(Weights):
    """Some blocks of another model, with its front and its head: what a student of it begins from.

    Args:
        whole: The other model.
        blocks: For each block, the number of that one that it begins as.
    """

    def __init__(self, whole: Weights, blocks: Sequence[int]) -> None:
        self._whole, self._blocks = whole, blocks
        sizes = ArchitectureConfig(n_stacks=len(blocks))
        attention, ffn = whole.model.attention.chosen(blocks), whole.model.ffn.chosen(blocks)
        moved = {
            "architecture": sizes,
            "attention": attention,
            "ffn": ffn,
            "first_norm": whole.model.at(blocks[0]).first_norm,
        }
        self.model = whole.model.model_copy(update=moved)
        self.tokenizer_json, self.objective, self.notes = whole.tokenizer_json, whole.objective, whole.notes
        self.checkpoint = getattr(whole, "checkpoint", None)

    def source(self, part: str, *, hashed: bool = True) -> Source:
        if part.startswith(BLOCK):
            part = block_part(self._blocks[int(part.removeprefix(BLOCK))])
        return self._whole.source(part, hashed=hashed)


class Adapted(Weights):
    """A checkpoint with adapters of peft: merged into its weights, or to train on beside them.

    Args:
        whole: The checkpoint.
        merged: Those that are added to its weights, in order.
        continued: Those that train on; None: there are none.
    """

    def __init__(
        self, whole: Pretrained, merged: Sequence[AdapterDirectory], continued: AdapterDirectory | None
    ) -> None:
        self._whole, self._merged, self.continued = whole, merged, continued
        self.model, self.tokenizer_json, self.objective = whole.model, whole.tokenizer_json, whole.objective
        self.notes, self.checkpoint = whole.notes, whole.checkpoint

    def source(self, part: str, *, hashed: bool = True) -> Source:
        """See `Weights.source`; of a block's adapters too."""
        block = part.removeprefix(ADAPTER)
        if block != part:
            checkpoint = self.continued
            return Source() if checkpoint is None or block not in checkpoint.pairs else _adapters_of(checkpoint, block)
        base = self._whole.source(part, hashed=hashed)
        added = [_adapters_of(checkpoint, part) for checkpoint in self._merged if part in checkpoint.pairs]
        if not added:
            return base
        digests = [source.digest for source in (base, *added)]
        digest = content_id("merged", digests) if hashed else None
        return dataclasses.replace(base, digest=digest, merged=(base, *added))

    def settle(self, config: StackWiseConfig) -> Iterator[str]:
        """Let `training.adapters` say what the adapters that train on are; a line for each key that contradicts."""
        checkpoint, adapters = self.continued, config.training.adapters
        if checkpoint is None or adapters is None:
            return
        theirs: dict[str, Any] = {"rank": checkpoint.rank, "rslora": checkpoint.rslora, "targets": checkpoint.layers}
        theirs["alpha"] = float(checkpoint.settings.get("lora_alpha", 8))
        for name in sorted(theirs.keys() & adapters.model_fields_set):
            if getattr(adapters, name) != theirs[name]:
                values = f"is {kind_of(getattr(adapters, name))}, and {kind_of(theirs[name])} in {checkpoint.directory}"
                yield f"training.adapters.{name}: {values}: leave it out"
        more: dict[str, Any] = {} if "above" in adapters.model_fields_set else {"above": checkpoint.lowest}
        if "dropout" not in adapters.model_fields_set:
            more["dropout"] = float(checkpoint.settings.get("lora_dropout", 0.0))
        config.training.adapters = adapters.model_copy(update=theirs | more)


def _adapters_of(one: AdapterDirectory, part: str) -> Source:
    return Source(str(one.directory), one.digest(part), pairs=one.pairs[part])


def _adapted(config: StackWiseConfig, path: Path) -> Weights:
    """A model with the adapters that `init` names."""
    begun = is_adapter(path)
    base = base_of(path, config.init.base) if begun else path
    if RunDirectory(base).manifest_file.exists():
        raise UsageError(f"init.adapters: {base} is a run; adapters are for a model", hint="export it, and name that")
    with under("init.weights" if config.init.base is None else "init.base"):
        whole = Pretrained(base, config.data.cache_dir)
    directories = [expanded(name).absolute() for name in config.init.adapters]
    for directory in directories:
        if not is_adapter(directory):
            raise NotFound(f"init.adapters: {directory} holds no adapters", hint="name a directory that peft saved")
    opened = [AdapterDirectory(folder, whole.checkpoint) for folder in ([path] if begun else []) + directories]
    trains_on = begun and config.training.adapters is not None
    return Adapted(whole, opened[1:] if trains_on else opened, opened[0] if trains_on else None)


def open_weights(config: StackWiseConfig) -> Weights:
    """What `init.weights` names, and of it the blocks that `init.blocks` does.

    Raises:
        NotFound: There is nothing there.
        UsageError: It is no model, or one that cannot be taken up exactly; or it lacks one of the blocks.
    """
    assert config.init.weights is not None
    weights = _opened(config, "init.weights", config.init.weights)
    if config.init.experts is None:
        return weights
    if isinstance(weights, Adapted):
        raise UsageError("init.experts: experts begin as whole models: export what has adapters, and name the export")
    further = [_opened(config, "init.experts", name) for name in config.init.experts]
    return Upcycled([weights, *further], config.model.ffn, config.seed)


def _opened(config: StackWiseConfig, key: str, name: str) -> Weights:
    """The model of a directory, of it the blocks that `init.blocks` says."""
    path = expanded(name).absolute()
    if not path.is_dir():
        raise NotFound(f"{key}: {path}: there is no such directory", hint="name the directory of a model")
    run = RunDirectory(path)
    weights: Weights
    if is_adapter(path) or config.init.adapters:
        weights = _adapted(config, path)
    else:
        with under(key):
            weights = Committed(run) if run.manifest_file.exists() else Pretrained(path, config.data.cache_dir)
    blocks, depth = config.init.blocks, weights.model.n_blocks
    if blocks is None:
        return weights
    if getattr(weights, "continued", None) is not None:
        raise UsageError(
            f"init.blocks: adapters of {path} train on beside the blocks that they are for, which are all of them",
            hint="name the model in init.weights and them in init.adapters: merged, they go with their blocks",
        )
    wrong = [block for block in ([blocks] if isinstance(blocks, int) else blocks) if block >= depth]
    if wrong:
        raise UsageError(f"init.blocks: there is no block {wrong[0]}: {path} has 0 to {depth - 1}")
    return Shallower(weights, range(0, depth, blocks) if isinstance(blocks, int) else blocks)


def with_checkpoint(config: StackWiseConfig) -> StackWiseConfig:
    """A configuration whose model, tokenizer and objective follow from `init.weights`; as it is where that is null.

    Raises:
        ConfigError: A setting that was given contradicts the checkpoint: each with both values.
        UsageError: See `open_weights`.
    """
    if config.init.weights is None:
        return config
    weights = open_weights(config)
    config = config.model_copy(deep=True)
    theirs = weights.model
    faults = [*_contradictions(config, theirs), *_tokenizer_faults(config, weights)]
    faults += weights.settle(config) if isinstance(weights, Adapted) else []
    if faults:
        raise ConfigError(faults, source=f"init.weights {config.init.weights}")
    configured = config.model
    model = theirs.model_dump() | {name: getattr(configured, name) for name in FREE & configured.model_fields_set}
    model["architecture"] = _stacks(config, theirs.n_blocks).model_dump()
    if configured.max_seq_len is not None:
        model["max_seq_len"] = configured.max_seq_len
    config.model = ModelConfig.model_validate(model)
    adapters, checkpoint = config.training.adapters, getattr(weights, "checkpoint", None)
    if adapters is not None and checkpoint is not None:
        adapters.targets = named_layers(checkpoint, adapters.targets)
    if faults := [f"{key}: {text}" for key, text in size_faults(config)]:
        raise ConfigError(faults, source=f"init.weights {config.init.weights}")
    if weights.tokenizer_json is not None:
        config.data.tokenizer = str(weights.tokenizer_json)
    training = config.training
    if "objective" not in training.model_fields_set:
        training.objective = weights.objective  # type: ignore[assignment]
    longest = config.model.max_seq_len
    if longest is not None and "seq_len" not in training.model_fields_set:
        training.seq_len = min(training.seq_len, longest)
    return config.validate()


def _contradictions(config: StackWiseConfig, theirs: ModelConfig) -> Iterator[str]:
    """A line for each setting of `model.*` that was given and that the checkpoint has otherwise."""
    model = config.model
    if config.training.continual.columns:
        yield "training.continual: columns begin fresh, no model elsewhere has them: leave it out, or init.weights"
        return
    if theirs.stream.columns > 1:
        yield "init.weights: a rack in columns is learned task by task, and nothing else begins from it: name another"
        return
    for key, value, there in _differences("model", model, theirs):
        yield f"{key}: is {kind_of(value)}, and {kind_of(there)} in the checkpoint: leave it out"
    try:
        _stacks(config, theirs.n_blocks)
    except ValueError as error:
        yield f"model.architecture: {error}"
    if model.max_seq_len is not None and theirs.max_seq_len is not None:
        learned = theirs.positions == "learned"
        if model.max_seq_len > theirs.max_seq_len or (learned and model.max_seq_len != theirs.max_seq_len):
            where = f"and {theirs.max_seq_len} in the checkpoint"
            advice = "leave it out" if learned else "leave it out, or lower it"
            yield f"model.max_seq_len: is {model.max_seq_len}, {where}: {advice}"


def _differences(key: str, ours: Section, theirs: Section) -> Iterator[tuple[str, Any, Any]]:
    """Settings that were given and differ: their keys, and both values. What is null was left to follow."""
    for name in sorted(ours.model_fields_set - FREE - {"architecture", "max_seq_len"}):
        value, there = getattr(ours, name), getattr(theirs, name)
        if isinstance(value, Kind) and isinstance(there, Kind):
            if type(value) is type(there):
                yield from _differences(f"{key}.{name}", value, there)
            else:
                yield f"{key}.{name}", value.name, there.name
        elif value is not None and value != there:
            yield f"{key}.{name}", value, there


def _stacks(config: StackWiseConfig, blocks: int) -> ArchitectureConfig:
    """How the checkpoint's blocks make stacks: as the configuration says, else a block a stack.

    Raises:
        ValueError: They do not.
    """
    model, progressive = config.model.architecture, config.training.progressive
    changed = model.model_fields_set
    stacks = model.n_stacks if model.n_stacks is not None else progressive.max_stacks if progressive.enabled else None
    size = model.blocks_per_stack if "blocks_per_stack" in changed else None
    if stacks is None:
        stacks = blocks // (size or 1)
    if size is None:
        size = max(1, blocks // stacks)
    if progressive.enabled and progressive.max_stacks is not None and progressive.max_stacks < stacks:
        stacks = progressive.max_stacks
    if stacks * size != blocks:
        raise ValueError(
            f"{stacks} stacks of {size} blocks, and {blocks} blocks in what it begins from: leave them out"
        )
    return ArchitectureConfig(n_stacks=stacks, blocks_per_stack=size)


def _tokenizer_faults(config: StackWiseConfig, weights: Weights) -> Iterator[str]:
    """Where the ids of the data would not be those of the weights."""
    tokenizer = config.data.tokenizer if "tokenizer" in config.data.model_fields_set else None
    if weights.tokenizer_json is None:
        if tokenizer in (None, "bpe"):
            yield "data.tokenizer: the checkpoint has no tokenizer.json: name the one that its ids are of"
    elif tokenizer is not None and expanded(tokenizer).absolute() != weights.tokenizer_json.absolute():
        theirs = Tokenizer.load(weights.tokenizer_json).id
        ours = bytes_tokenizer if tokenizer == "bytes" else lambda: Tokenizer.load(expanded(tokenizer))
        if tokenizer == "bpe" or ours().id != theirs:
            where = f"{weights.tokenizer_json} in the checkpoint"
            yield f"data.tokenizer: is {kind_of(tokenizer)}, and {where}: leave it out"


def initial_sources(
    config: StackWiseConfig, report: Callable[[int, int], None] | None = None, *, hashed: bool = True
) -> Versions:
    """Where each part of the rack has its first weights; none without `init.weights`.

    Args:
        config: The configuration, as `with_checkpoint` returns it.
        report: Called with the parts whose digests are known, and all: hashing takes as long as reading.
        hashed: Whether digests are asked for: a recipe needs them.

    Raises:
        UsageError: See `open_weights`.
    """
    if config.init.weights is None:
        return {}
    weights = open_weights(config)
    blocks = block_parts(0, config.model.n_blocks - 1)
    parts = [FRONT, *blocks, HEAD]
    if getattr(weights, "continued", None) is not None:
        parts += [adapter_part(block) for block in blocks[config.bottom :]]
    sources: Versions = {}
    for number, part in enumerate(parts):
        if report is not None:
            report(number, len(parts))
        if (source := weights.source(part, hashed=hashed)).path is not None:
            sources[part] = source
    # A stage that stands apart from those below it begins with the head as it was, not as another stage left it.
    return sources | ({FIRST_HEAD: sources[HEAD]} if HEAD in sources else {})


MOST_ADDED = 2
"""Ids that a checkpoint's vocabulary may grow by: a separator and a mask token where its tokenizer has none."""
RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>|\[unused\d+\]|<unused\d+>|<\|extra_\d+\|>")
"""Names of ids that tokenizers keep free for their users."""


def tokenizer_limit(config: StackWiseConfig) -> int | None:
    """The size that a tokenizer must fit into before the data is prepared (see `prepare`).

    Raises:
        UsageError: The tokenizer has more ids than the checkpoint that it is for.
    """
    size = config.model.vocab_size
    if config.init.weights is None or size is None or config.data.tokenizer in ("bpe", "bytes"):
        return size
    ids = Tokenizer.load(expanded(config.data.tokenizer)).vocab_size
    if ids > size + MOST_ADDED:
        raise UsageError(
            f"data.tokenizer: {config.data.tokenizer} has {ids} ids, and the embedding of {config.init.weights} "
            f"{size} rows",
            hint="name the tokenizer that the checkpoint was trained with",
        )
    return None


def settle_mask(config: StackWiseConfig, tokenizer: Tokenizer) -> str | None:
    """Find the id that stands for masked tokens of a checkpoint, and put one that is reserved into the configuration.

    Returns:
        Which it is, in a line, where the checkpoint has no mask token of its own.
    """
    size = config.model.vocab_size
    if config.init.weights is None or size is None or not (config.objective.masks and config.objective.shows_mask):
        return None
    if config.training.mask_token_id is not None or config.data.tokenizer in ("bpe", "bytes"):
        return None
    names = Tokenizer.names_in(expanded(config.data.tokenizer))
    if tokenizer.mask_id in names.values():
        return None
    if tokenizer.mask_id < size:
        return f"masked positions show id {tokenizer.mask_id}, which no token of the checkpoint's tokenizer uses"
    reserved = min((i for name, i in names.items() if RESERVED.fullmatch(name) and i < size), default=None)
    if reserved is not None:
        config.training.mask_token_id = reserved
        return f"masked positions show id {reserved}, which the checkpoint's tokenizer reserves"
    added = f"id {tokenizer.mask_id} is added to the model for masked positions"
    return f"{added}: its row of embedding and head is the mean of the others"


class Upcycled(Weights):
    """Dense models as one with experts: of one (sparse upcycling, arXiv 2212.05055), or of several.

    Several, each trained on a cluster of the data, whose feed-forwards become the experts, are the way of MoE-DisCo
    (arXiv 2601.06857); everything else is their mean here.

    Args:
        models: The models, alike but for their values.
        ffn: The feed-forward that takes the place of theirs.
        seed: What is in no dense model, a router, is drawn from it.

    Raises:
        UsageError: They are not alike, or the feed-forward cannot begin as theirs.
    """

    def __init__(self, models: Sequence[Weights], ffn: FeedForward, seed: int) -> None:
        first = models[0]
        for number, other in enumerate(models[1:]):
            if other.model.specification() != first.model.specification():
                raise UsageError(f"init.experts: model {number} is not of the shape of init.weights: take runs alike")
            if _tokens(other) != _tokens(first):
                raise UsageError(
                    f"init.experts: model {number} has another tokenizer than init.weights: take runs alike"
                )
        dense = first.model
        self.model = dense.model_copy(update={"ffn": ffn, "d_ff": dense.ffn_width})
        for block in range(dense.n_blocks):
            mine = self.model.at(block)
            fault = next(mine.ffn.upcycling_faults(mine, dense.at(block), len(models)), None)
            if fault is not None:
                raise UsageError(f"init.experts: block {block}: {fault}")
        self._models, self._seed = models, seed
        self.tokenizer_json, self.objective, self.notes = first.tokenizer_json, first.objective, first.notes

    def source(self, part: str, *, hashed: bool = True) -> Source:
        sources = tuple(model.source(part, hashed=hashed) for model in self._models)
        changed = part.startswith(BLOCK) and self.model.at(block_number(part)).ffn.upcycles
        if any(source.path is None for source in sources):
            return Source()
        if not changed and len(sources) == 1:
            return sources[0]
        digests = [source.digest for source in sources]
        digest = content_id("upcycled", [*([str(self._seed)] if changed else []), *digests]) if hashed else None
        return dataclasses.replace(sources[0], digest=digest, recipe="", names=None, upcycled=sources)


def _tokens(weights: Weights) -> str | None:
    path: Path | None = weights.tokenizer_json
    return None if path is None else Tokenizer.load(path).id
