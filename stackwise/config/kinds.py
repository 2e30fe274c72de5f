"""Choices that carry their own settings: `optimizer: {name: muon, momentum: 0.95}`; what each kind says of itself.

A kind is one class: its fields are its settings, its methods are its facts (parameters, bytes, what goes into
recipes). The configuration holds an instance of it, so that the estimate of memory, the recipe, the checks and the
export ask it, and nobody compares its name. A plain string is short for a mapping with the name alone. Kinds from
outside register themselves:

    from stackwise.config.kinds import OPTIMIZERS, Optimizer

    @OPTIMIZERS.register("lion")
    class Lion(Optimizer):
        beta: float = Field(0.9, description="...")

The built-in kinds are in the rooms of their subjects, in modules that import no torch. All sorts are here together,
although the file is long for it: it is the one that kinds from outside import from, and each sort is a list of what a
kind may say of itself, with hardly a computation.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, GetCoreSchemaHandler, SerializationInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from stackwise.config.fields import Section
from stackwise.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stackwise.config.model import ModelConfig
    from stackwise.config.schema import Settings

ATTENTIONS: Registry[type[Attention]] = Registry(
    "attention",
    f"{__name__}:Attention",
    "stackwise.model.kinds",
    {"mha": "MultiHead", "gqa": "GroupedQuery", "mla": "Latent", "linear": "Linear"},
)
FEED_FORWARDS: Registry[type[FeedForward]] = Registry(
    "feed-forward",
    f"{__name__}:FeedForward",
    "stackwise.model.kinds",
    {"swiglu": "SwiGLU", "geglu": "GeGLU", "gelu": "GELU", "moe": "stackwise.model.moe:MoE"},
)
ROPE_SCALINGS: Registry[type[RopeScaling]] = Registry(
    "rope scaling",
    f"{__name__}:RopeScaling",
    "stackwise.model.scalings",
    {
        "none": "Unscaled",
        "linear": "LinearScaling",
        "dynamic": "DynamicScaling",
        "llama3": "Llama3Scaling",
        "yarn": "YarnScaling",
    },
)
STREAMS: Registry[type[Stream]] = Registry(
    "stream", f"{__name__}:Stream", "stackwise.model.streams", {"whole": "Whole", "columns": "Columns"}
)
HEADS: Registry[type[HeadKind]] = Registry(
    "head", f"{__name__}:HeadKind", "stackwise.model.kinds", {"linear": "LinearHead", "transform": "TransformHead"}
)
OPTIMIZERS: Registry[type[Optimizer]] = Registry(
    "optimizer",
    f"{__name__}:Optimizer",
    "stackwise.training.kinds",
    {"adamw": "AdamW", "muon": "Muon", "adamw8bit": "AdamW8bit"},
)
OBJECTIVES: Registry[type[Objective]] = Registry(
    "objective",
    f"{__name__}:Objective",
    "stackwise.objectives.kinds",
    {
        "mask_diffusion": "MaskDiffusion",
        "mlm": "MLM",
        "clm": "CLM",
        "custom": "Custom",
        "sft": "SFT",
        "dpo": "DPO",
        "reward": "Reward",
        "ppo": "PPO",
    },
)
SCORES: Registry[type[Score]] = Registry(
    "score",
    f"{__name__}:Score",
    "stackwise.objectives.kinds",
    {"length": "Length", "pattern": "Pattern", "model": "RewardModel"},
)
TRACKERS: Registry[type[Tracker]] = Registry(
    "tracker",
    f"{__name__}:Tracker",
    "stackwise.pipeline.tracking.trackers",
    {
        "tensorboard": "TensorBoard",
        "wandb": "WeightsAndBiases",
        "mlflow": "MLflow",
        "clearml": "ClearML",
        "neptune": "Neptune",
    },
)


class Kind(Section):
    """One kind of a sort: its fields are settings, its methods facts. A sort is a direct subclass with a registry."""

    registry: ClassVar[Registry[Any]]
    """Where the kinds of this sort are found by name."""
    tag: ClassVar[str] = "name"
    """The key that says the kind's name."""
    default: ClassVar[str]
    """The name of the kind that is taken where none is given."""

    @property
    def name(self) -> str:
        """Its name in the registry."""
        return self.registry.name_of(type(self))

    @property
    def code(self) -> dict[str, str]:
        """The digest of the file that a kind from outside is in, for identities; empty: it is built in."""
        digest = self.registry.code(self.name)  # built-in code is covered by the numerics version
        return {} if digest is None else {"code": digest}

    def placed(self, absolute: Callable[[str], str]) -> Self:
        """Itself, its paths independent of the current directory."""
        return self

    def plain(self) -> dict[str, Any]:
        """Name and settings, as a configuration says them."""
        return {self.tag: self.name} | self.model_dump()

    @classmethod
    def of(cls, value: Any) -> Self:
        """The kind that a name, or a mapping with the name and settings, stands for.

        Raises:
            ValidationError: There is none of this name, or its settings are faulty.
        """
        if isinstance(value, cls):  # assigned by a library user
            return value
        plain = {cls.tag: value} if isinstance(value, str) else value  # a name alone
        if not isinstance(plain, Mapping):
            raise PydanticCustomError("kind_type", "must be a name, or a mapping with {tag}", {"tag": cls.tag})
        names = ", ".join(cls.registry.names())
        if cls.tag not in plain:
            context = {"tag": cls.tag, "names": names, "given": dict(plain)}
            raise PydanticCustomError("kind", "must have {tag}, one of {names}", context)
        name = plain[cls.tag]
        if not isinstance(name, str) or name not in cls.registry:
            raise PydanticCustomError("kind", "must be one of {names}", {"names": names, "given": name})
        kind: type[Self] = cls.registry[name]
        return kind.model_validate({key: setting for key, setting in plain.items() if key != cls.tag})

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A field annotated with a sort takes any of its kinds; a kind itself is a section like any other."""
        if "registry" not in cls.__dict__:  # not a sort but one kind
            return handler(source)
        dump = core_schema.plain_serializer_function_ser_schema(_dump, info_arg=True)
        return core_schema.no_info_plain_validator_function(cls.of, serialization=dump)


def _dump(kind: Kind, info: SerializationInfo) -> dict[str, Any]:
    return {kind.tag: kind.name} | kind.model_dump(mode=info.mode)


def choice(sort: type[Kind], description: str) -> Any:
    """A field that takes any kind of a sort; where it is left out, the sort's default. `init` lists the kinds."""
    return Field(default_factory=lambda: sort.of(sort.default), description=description)


Fault = tuple[str, str]
"""A key, relative to the section that is asked, and what is wrong with it."""


@dataclass(frozen=True)
class TensorPlan:
    """How ranks split a part's layers: in pairs, so that a pair is one sum over ranks (arXiv 1909.08053, section 3).

    Args:
        layers: By their names in the module. column: each rank has some of its outputs; row: some of its inputs; heads:
            a norm of each head, which every rank has whole.
        counts: By the name of a setting what the number of ranks has to divide.
    """

    layers: Mapping[str, Literal["column", "row", "heads"]]
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Matrix:
    """A linear layer of a block: an `nn.Linear` in its module.

    Args:
        outputs: Its width on the way out.
        inputs: Its width on the way in.
        bias: Whether it has a bias.
        narrow: Whether it may carry adapters and be held in a narrow format.
    """

    outputs: int
    inputs: int
    bias: bool = False
    narrow: bool = True


class BlockPart(Kind):
    """What attentions and feed-forwards say of themselves.

    A module from outside keeps to this: its buffers are made by a method `rebuild(device)` of the module that has them
    (blocks are built without values first); its weights of two and more dimensions are drawn, vectors start at zero,
    and at one where their name ends with "norm.weight". A loss of its own is left in an attribute `terms` (see
    `stackwise.batch.Term`); generation and evaluation pass it over. A method `prepare(batch)` is called before each
    pass of a stage. An attribute `steered` names parameters that no optimizer moves but a rule: each step, by the rate
    that stands there, up where its gradient is below the mean of all, down where it is above. Where `pieces` names
    modules inside, which draw no random numbers, an attribute `lend` is None, or is called as `lend(module, rows)` in
    place of each of these; one that has no rows is passed over, and may have no values. An attribute `routed` is None
    there, or is called as `routed(block, choices)` with the number of the piece that each of a row's choices goes to,
    int64 [rows, choices].
    """

    tag: ClassVar[str] = "kind"
    residual: ClassVar[tuple[str, ...]] = ()
    """Its matrices that write into the residual stream: their fresh weights shrink with depth. `*` is any name."""

    @abc.abstractmethod
    def matrices(self, model: ModelConfig) -> dict[str, Matrix]:
        """Its linear layers, by their names in the module."""

    def other_parameters(self, model: ModelConfig) -> int:
        """Parameters that are in no linear layer: norms, experts in one tensor."""
        return 0

    def parameters(self, model: ModelConfig) -> int:
        """Parameters in one block."""
        layers = self.matrices(model).values()
        return self.other_parameters(model) + sum(m.outputs * m.inputs + m.bias * m.outputs for m in layers)

    def active_parameters(self, model: ModelConfig) -> int:
        """Parameters that a token goes through."""
        return self.parameters(model)

    def pieces(self, model: ModelConfig) -> tuple[str, ...]:
        """Modules in its module that rows may pass by, by their paths; it has an attribute `lend` (see above)."""
        return ()

    def narrowest(self, model: ModelConfig) -> int:
        """The highest rank of adapters that all its matrices can carry."""
        # a product of two narrower matrices has no higher rank
        sides = (min(m.outputs, m.inputs) for m in self.matrices(model).values() if m.narrow)
        return min(sides, default=model.d_model)

    def tensor_plan(self, model: ModelConfig) -> TensorPlan | None:
        """How ranks split its layers (`parallel.tensor`); None: they cannot."""
        return None

    @abc.abstractmethod
    def kept(self, model: ModelConfig) -> int:
        """Numbers a token that it keeps for its backward pass: what enters and leaves its layers.

        An attention counts the inputs and outputs of both norms of the block too.
        """

    def copied(self, model: ModelConfig) -> int:
        """Numbers a token that it keeps beside `kept` where it computes in 16 bits: each of its layers that reads what
        enters the part has a narrow copy of its own.
        """
        layers = self.matrices(model).items()
        readers = sum(m.inputs == model.d_model and f"{name}.weight" not in self.residual for name, m in layers)
        return max(0, readers - 1) * model.d_model

    def specification(self, model: ModelConfig) -> dict[str, Any]:
        """What of it shapes a forward pass beside the weights, defaults resolved."""
        return self.plain()

    def training_specification(self, model: ModelConfig) -> dict[str, Any]:
        """What of it shapes training alone: neither a forward pass without it, nor what is stored of one."""
        return {}

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        """What of its settings the model cannot have."""
        yield from ()

    def faults_in(self, config: Settings) -> Iterator[Fault]:
        """What of its settings the rest of the configuration cannot have."""
        yield from ()

    def unused(self) -> Iterator[tuple[str, str | bool]]:
        """Names of its settings, with blanks between, and why they are unused; False: they are used."""
        yield from ()


class Attention(BlockPart):
    """What queries, keys and values are made of, and how they meet."""

    registry: ClassVar[Registry[Any]] = ATTENTIONS
    default: ClassVar[str] = "mha"
    residual: ClassVar[tuple[str, ...]] = ("o.weight",)
    caches: ClassVar[bool] = True
    """Whether it can keep what it needs of earlier positions; generation else goes over all of them for each token."""
    scales_scores: ClassVar[bool] = False
    """Whether a factor on rotated queries and keys is one on all scores, as YaRN's attention factor is meant."""

    def key_heads(self, model: ModelConfig) -> int:
        """Heads of keys and values."""
        return model.n_heads

    def rotary_width(self, model: ModelConfig) -> int:
        """Width of a head's rotary part; 0 where positions are learned."""
        return model.head_dim if model.positions == "rope" else 0

    def rope_theta(self, model: ModelConfig) -> float:
        """Base of the rotary wavelengths of a block, of which this is resolved (`in_block`)."""
        return model.rope_theta

    def in_block(self, block: int) -> Attention:
        """Itself as block `block` of the rack has it; it may be of another kind there."""
        return self

    def chosen(self, blocks: Sequence[int]) -> Attention:
        """Itself in a rack of some of the blocks: block k of it is block `blocks[k]` of this one."""
        return self

    @abc.abstractmethod
    def build(self, model: ModelConfig) -> nn.Module:
        """The module: `forward(x_BSD, *, causal, segments_BS, cache)` gives [B, S, D]."""


class FeedForward(BlockPart):
    """The feed-forward of a block."""

    registry: ClassVar[Registry[Any]] = FEED_FORWARDS
    default: ClassVar[str] = "swiglu"
    residual: ClassVar[tuple[str, ...]] = ("down.weight",)
    divides: ClassVar[bool] = True
    """Whether its weights may be divided over ranks (`parallel.shard`)."""
    upcycles: ClassVar[bool] = False
    """Whether it begins as dense feed-forwards that it is made of (`init.experts`)."""

    def width(self, d_model: int) -> int:
        """Its inner width where `model.d_ff` is null."""
        return 4 * d_model

    def in_block(self, block: int) -> FeedForward:
        """Itself as block `block` of the rack has it; it may be of another kind there."""
        return self

    def chosen(self, blocks: Sequence[int]) -> FeedForward:
        """Itself in a rack of some of the blocks: block k of it is block `blocks[k]` of this one."""
        return self

    def upcycling_faults(self, model: ModelConfig, dense: ModelConfig, models: int) -> Iterator[str]:
        """Why it cannot begin as the feed-forwards of dense models; a dense one begins as their mean.

        Args:
            model: The rack's configuration, as the block has it.
            dense: That of the dense models, as they have the block.
            models: How many they are.
        """
        if self.specification(model) != dense.ffn.specification(dense):
            yield f"model.ffn: {self.name} is none that begins as {dense.ffn.name}: set it to {{kind: moe, experts: 8}}"

    def upcycled(self, model: ModelConfig, dense: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What it begins as, by the names of its parameters; what is left out stays as it was drawn (`upcycles`)."""
        raise TypeError(f"{self.name} begins as no others")

    @abc.abstractmethod
    def build(self, model: ModelConfig) -> nn.Module:
        """The module: [..., D] to [..., D]."""


class Stream(Kind):
    """How the residual stream is divided, and what of blocks, front and head follows from it."""

    registry: ClassVar[Registry[Any]] = STREAMS
    tag: ClassVar[str] = "kind"
    default: ClassVar[str] = "whole"
    caches: ClassVar[bool] = True
    """Whether attention can keep what it needs of earlier positions, where its kind can."""

    @property
    def columns(self) -> int:
        """Columns of one width that it is divided into."""
        return 1

    def parts(self, attention: Attention, ffn: FeedForward) -> tuple[Attention, FeedForward]:
        """The attention and the feed-forward of a block over the whole stream, of those of a column."""
        return attention, ffn

    def column_parameters(self, model: ModelConfig, column: int) -> int:
        """Parameters of a column in one block, counted from 0."""
        return model.block_parameters

    def specification(self) -> dict[str, Any]:
        """What of it shapes a forward pass; empty where it is whole, whose recipes are older."""
        return {}

    @abc.abstractmethod
    def norm(self, model: ModelConfig) -> nn.Module:
        """A norm over the stream."""

    @abc.abstractmethod
    def front(self, model: ModelConfig, vocab_size: int, seq_len: int) -> Any:
        """The front (`stackwise.model.Front`)."""

    @abc.abstractmethod
    def head(self, model: ModelConfig, vocab_size: int, embedding: Tensor | None) -> Any:
        """The plain head (`stackwise.model.Head`)."""

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        """What the model cannot have with it, by the model's keys."""
        yield from ()


class RopeScaling(Kind):
    """How rotary positions reach beyond the length that a model was trained with."""

    registry: ClassVar[Registry[Any]] = ROPE_SCALINGS
    tag: ClassVar[str] = "kind"
    default: ClassVar[str] = "none"

    @abc.abstractmethod
    def frequencies(self, width: int, theta: float, length: int) -> tuple[Tensor, float]:
        """Radians a position of each pair of dimensions, float32 [width / 2] on the CPU, and a factor on the tables.

        Args:
            width: Width of a head; even.
            theta: Base of the wavelengths.
            length: Positions of the row.
        """

    def reach(self, length: int) -> int:
        """What of a row's length its frequencies depend on: rows of the same value have the same tables."""
        return 0

    def specification(self) -> dict[str, Any]:
        """What of it shapes a forward pass; empty where nothing is scaled, whose recipes are older."""
        return self.plain() | self.code

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        """What of its settings the model cannot have."""
        yield from ()


class HeadKind(Kind):
    """What makes logits of the vectors that leave the last block."""

    registry: ClassVar[Registry[Any]] = HEADS
    tag: ClassVar[str] = "kind"
    default: ClassVar[str] = "linear"

    @abc.abstractmethod
    def parameters(self, model: ModelConfig, vocab_size: int) -> int:
        """Parameters beside the projection."""

    def specification(self) -> dict[str, Any]:
        """What of it shapes a forward pass beside the weights; empty for the plain one, whose recipes are older."""
        return self.plain() | self.code

    @abc.abstractmethod
    def build(self, model: ModelConfig, vocab_size: int, embedding: Tensor | None = None) -> Any:
        """The module (`stackwise.model.Head`); the arguments are its."""


class Optimizer(Kind):
    """How parameters follow from gradients."""

    registry: ClassVar[Registry[Any]] = OPTIMIZERS
    default: ClassVar[str] = "adamw"
    divides: ClassVar[bool] = False
    """Whether it takes each element by itself, so that a rank may have a slice of a parameter (`parallel.shard`)."""

    @abc.abstractmethod
    def state_bytes(self, blocks: int, rest: int) -> int:
        """Bytes of its state.

        Args:
            blocks: Parameters of whole blocks.
            rest: All others: front, head, adapters.
        """

    def family(self, part: str, dimensions: int) -> str:
        """Which of its ways a parameter is updated in; one name where there is one way.

        Args:
            part: Its part: front, block.N, head, and others.
            dimensions: 2: it is a matrix.
        """
        return ""

    @abc.abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> Any:
        """The optimizer, as torch has them; its state is tensors alone, by parameter.

        Args:
            groups: Its `param_groups`, each with `params`, `lr`, `weight_decay`; beside them `family`, and `scale`,
                their share of the stage's learning rate. Those of one family follow each other.
        """


class Objective(Kind):
    """What is predicted, and how it is scored."""

    registry: ClassVar[Registry[Any]] = OBJECTIVES
    default: ClassVar[str] = "mask_diffusion"
    masks: ClassVar[bool] = True
    """Whether positions are masked, each row at its share."""
    shows_mask: ClassVar[bool] = True
    """Whether masked positions show the mask token, so that there must be one."""
    scores_alone: ClassVar[bool] = False
    """Whether a text's tokens are scored one by one, each masked alone: its loss at few masked shares is no bound."""
    inputs: ClassVar[tuple[str, ...]] = ()
    """What a batch must bring beside tokens and masks."""
    sequences: ClassVar[int] = 1
    """Sequences in a sample, of one length, which see nothing of each other."""
    packs: ClassVar[bool] = False
    """Whether samples hold several documents which must not see each other, unless the configuration says so."""
    continued_as: ClassVar[str | None] = None
    """The objective that fits what was trained with it, where that is evaluated or begun from; None: itself."""
    score_width: ClassVar[int | None] = None
    """Numbers that the head gives of a position beside its logits; None: none."""
    watched: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Of terms that are only looked at: the names of their numbers, which say how training goes."""
    evaluated: ClassVar[Literal["text", "pairs", "answers"]] = "text"
    """What its held-out figures are of: the text itself, pairs, or answers that the rack draws to prompts."""
    rolls_out: ClassVar[bool] = False
    """Whether it trains on answers that the rack itself draws to the rows' prompts, anew in each window."""

    @property
    def reference(self) -> str | None:
        """The model whose log-probabilities a batch brings too; empty: that which the run begins from; None: none."""
        return None

    @property
    def causal(self) -> bool:
        """Whether positions see none that follow."""
        return False

    def positions(self, seq_len: int) -> int:
        """Positions of a row of activations."""
        return seq_len

    def unadaptable(self) -> str | None:
        """Why a rack trained with it cannot be turned causal; None: it can."""
        return None

    def specification(self, seed: int) -> dict[str, Any]:
        """What of it shapes a forward pass beside the weights: what it shows of a sample, and how.

        One that shows the mask token at masked positions, and nothing else, has nothing to add.
        """
        return self.plain() | self.code | {"seed": seed}

    def scoring(self) -> dict[str, Any]:
        """What of it shapes the loss, for the recipe; the name among it."""
        return self.plain()

    @abc.abstractmethod
    def build(self, mask_token: int, vocab_size: int, seed: int) -> Any:
        """The objective itself (`stackwise.objectives.objective.RuntimeObjective`).

        Args:
            mask_token: The id shown at masked positions.
            vocab_size: Ids that the model knows.
            seed: The run's.
        """

    def faults(self, seq_len: int) -> Iterator[Fault]:
        """What of its settings samples of this length cannot have."""
        yield from ()

    def figures(self, observed: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """What was looked at, by the names of `watched`."""
        pairs = ((self.watched.get(term, ()), values) for term, values in observed.items())
        return {name: value for names, values in pairs for name, value in zip(names, values, strict=False)}

    def window_rows(self, rows: int) -> int:
        """Rows that a window draws where its steps read so many."""
        return rows

    def check_samples(self, split: Any, seq_len: int) -> None:
        """Hold a side of the data (`stackwise.data.split.Split`) against the samples' length.

        Raises:
            UsageError: It cannot be.
        """
        return


class Score(Kind):
    """What an answer is worth, as a number: what reinforcement learning raises."""

    registry: ClassVar[Registry[Any]] = SCORES
    default: ClassVar[str] = "length"

    @property
    def run(self) -> str | None:
        """The directory of the run whose reward model says the scores; None: `scores` does."""
        return None

    @abc.abstractmethod
    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
        """The scores of answers to prompts, each without the token that ended it, as many finite numbers.

        It must be a function of its arguments alone: what is drawn or looked up elsewhere is in no recipe.
        """


class Tracker(Kind):
    """Where figures go as training runs, beside the run's own log."""

    registry: ClassVar[Registry[Any]] = TRACKERS
    tag: ClassVar[str] = "kind"
    default: ClassVar[str] = "tensorboard"
    inside: ClassVar[bool] = False
    """Whether the runner itself keeps it; the others have a process of their own, which may hang without harm."""
    named: ClassVar[bool] = True
    """Whether it knows runs by project, group and name."""

    def packages(self) -> dict[str, str]:
        """The modules that it imports, each with what `pip install` is to be given."""
        return {}

    @abc.abstractmethod
    def build(self) -> Any:
        """What takes the figures: `open`, `log` and `close` (`stackwise.pipeline.tracking.trackers.TrackerClient`)."""
