"""Every setting: its type, its default, what it means. The YAML maps onto these classes one to one.

A field's description is its documentation: `stackwise init` writes it as the comment above the key.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PrivateAttr
from pydantic_core import PydanticCustomError

from stackwise.config.choices import CausalAdaptation
from stackwise.config.fields import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    PositiveInt,
    Section,
    Size,
    Small,
    Text,
)
from stackwise.config.kinds import Objective, Tracker
from stackwise.config.model import ModelConfig
from stackwise.config.parallel import ParallelConfig
from stackwise.config.training import Precision, StackPrecision, StageTraining, TrainingConfig
from stackwise.config.tune import TuneConfig
from stackwise.registry import CODECS


def _codec(name: str) -> str:
    base, dash, compression = name.partition("-")
    if base not in CODECS or (dash and compression not in ("blosc", "zstd")):
        names = [f"{base}{more}" for base in CODECS.names() for more in ("", "-blosc", "-zstd")]
        raise PydanticCustomError("codec", "must be one of {names}", {"names": ", ".join(names)})
    return name


Codec = Annotated[Text, AfterValidator(_codec)]

CHAT_TEMPLATES = ("chatml", "plain")
"""Chat templates that are known by name (`stackwise.data.chat`)."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
DEVICE = r"^(auto|cpu|mps|cuda(:\d+)?)$"
PATTERNS = {NAME: "letters, digits, dots and dashes", DEVICE: "one of auto, cuda, cuda:N, mps, cpu"}
"""Patterns of text fields, and what they allow in words."""


class TaskConfig(Section):
    """A data set that is a task of its own (`data.tasks`)."""

    name: str = Field(pattern=NAME, max_length=64, description="what it is called: letters, digits, dots, dashes")
    paths: list[Annotated[Text, Field(min_length=1)]] = Field(min_length=1, description="its text, as in data.paths")


class DataConfig(Section):
    """The text: where it is, how it becomes tokens, what is held out."""

    paths: list[Annotated[Text, Field(min_length=1)]] = Field(
        default_factory=list,
        description="files, folders and patterns (*.txt) of text, web pages, notebooks, jsonl, json, parquet (also "
        ".gz, .bz2, .zst), Hugging Face data sets, or one prepared data set; empty: the Python standard library on "
        "this machine",
    )
    tasks: Annotated[list[TaskConfig], Field(max_length=256)] = Field(
        default_factory=list,
        description="several data sets instead of data.paths, each a task, in the order in which they are learned: "
        "[{name: english, paths: [en]}, {name: french, paths: [fr]}]; one tokenizer over all, no sample holds two of "
        "them, and each has documents of its own held out",
    )
    follow_links: bool = Field(False, description="follow links that lead out of a folder of data.paths")
    text_column: Text = Field(
        "text", description="column of jsonl, json, parquet and data set rows that holds the text; doc.text: within doc"
    )
    columns: list[Text] = Field(
        default_factory=list,
        description="named columns, one value a token, that are kept of rows of input_ids beside their targets",
    )
    tokenizer: Text = Field(
        "bpe", description="bpe (byte-level, trained on the text once), bytes, or the path of a tokenizer.json"
    )
    vocab_size: Size | None = Field(None, description="size that bpe is trained to; null: model.vocab_size, else 4096")
    chat_template: Text | None = Field(
        None,
        description="how messages become text: chatml, plain, or the path of a jinja file; null: as the tokenizer's "
        "own files say",
    )
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.05, description="share of the documents held out from training, chosen by their content"
    )
    max_bytes: PositiveInt | None = Field(
        None, description="read at most so many bytes of text, of data.tasks of each; null: all of it"
    )
    within_documents: bool = Field(
        False, description="attention stays within a document; false: a sample is one text, whatever documents it holds"
    )
    cache_dir: Text | None = Field(
        None, description="where prepared data and tokenizers are kept; null: the user's cache directory"
    )


class StoreConfig(Section):
    """The activation store."""

    path: Text | None = Field(
        None,
        description="directory of the store; null: `store` in the run directory. With {rank} or {host} in it, as of "
        "ranks on several hosts, each rank or host has a store of its own",
    )
    keep: Literal["all", "none"] | Count = Field(
        "all", description="boundaries kept beside those being read and written: a number, all, none"
    )
    codec: Annotated[Codec | None, CODECS] = Field(
        None, description="how activations are stored, null: bf16; each also with -blosc or -zstd"
    )
    max_bytes: PositiveInt | None = Field(
        None,
        description="most bytes that boundaries may take, with training.windows boundaries and committed stages "
        "together; null: the disk",
    )
    chunk_bytes: Annotated[int, Field(ge=1, le=1 << 40)] = Field(
        8 << 20, description="bytes of a chunk of activations, about: what is written and published at a time"
    )
    every: Size = Field(
        1, description="store every so-many-th boundary; stages between recompute theirs, in memory, from the one below"
    )
    fuse_passes: bool = Field(
        False,
        description="make a boundary while the stage above trains on it, not in a pass before: it is read once less, "
        "and the stage below stays in memory, frozen",
    )


class EvaluationConfig(Section):
    """Held-out evaluation after the last stage."""

    fractions: Annotated[list[Fraction], Field(min_length=1, max_length=100)] = Field(
        default_factory=lambda: [0.15, 0.5, 0.9], description="masked shares at which loss and accuracy are measured"
    )
    samples: Size = Field(128, description="held-out samples used, at most")
    batch_size: Size = Field(16, description="held-out samples in a batch")


class TrackingConfig(Section):
    """Where figures go as training runs, beside the run's own log. Keys and tokens come from the environment."""

    trackers: Annotated[list[Tracker], Field(max_length=16)] = Field(
        default_factory=lambda: [Tracker.of(Tracker.default)],
        description="where figures go beside the run's own log, several in a list",
    )
    project: Text = Field("stackwise", min_length=1, description="W&B project, MLflow experiment")
    group: Text | None = Field(None, description="W&B group, MLflow tag; null: none, in a sweep the sweep's name")
    name: Text | None = Field(None, description="what the run is called there; null: its directory's name")


class SlurmConfig(Section):
    """What a job asks for (`stackwise run --engine slurm`); it changes no result."""

    partition: Text | None = Field(None, description="partition that jobs go to; null: the cluster's default")
    nodes: Small = Field(
        1, description="nodes of a job, which share the ranks of parallel.* equally; more than one: set nodelist"
    )
    nodelist: Text | None = Field(
        None, description="the node that has the store; with several nodes, all of them; null: the machine that submits"
    )
    minutes: Size = Field(1440, description="time limit of a job; one that reaches it saves and is queued again")
    signal_seconds: Size = Field(120, description="seconds before the limit that a job is told to save")
    gpus: Count | None = Field(
        None, description="GPUs of each node; null: one for each rank there, none where device is cpu"
    )
    cpus: Size | None = Field(
        None, description="CPUs of a job; with several nodes, of each rank; null: the cluster's default"
    )
    memory_gb: Positive | None = Field(
        None, description="memory of a job on each node, in GB; null: the cluster's default"
    )
    account: Text | None = Field(None, description="account that jobs are charged to; null: the user's default")
    qos: Text | None = Field(None, description="quality of service; null: the user's default")
    parameters: dict[Text, Text | int | bool] = Field(
        default_factory=dict, description="further options of sbatch by name, as {constraint: nvme}"
    )


class InitConfig(Section):
    """Where the weights of a run come from."""

    weights: Annotated[Text, Field(min_length=1)] | None = Field(
        None,
        description="begin from a pretrained model: a Hugging Face directory (config.json, safetensors, "
        "tokenizer.json), an export, a finished run, or adapters of peft over one of the first two; model.* and "
        "data.tokenizer follow from it; null: fresh weights",
    )
    base: Annotated[Text, Field(min_length=1)] | None = Field(
        None, description="the model that adapters in init.weights are for; null: as their adapter_config.json says"
    )
    adapters: Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=64)] = Field(
        default_factory=list, description="directories of peft's adapters that are merged into the weights, in order"
    )
    experts: Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=1023)] | None = Field(
        None,
        description="let the experts of model.ffn begin as the feed-forwards of init.weights and of these further "
        "models like it, in turn; everything else begins as the mean of all. []: of init.weights alone (upcycling); "
        "null: no expert begins as anything",
    )
    blocks: Small | Annotated[list[Annotated[int, Field(ge=0, lt=1024)]], Field(min_length=1)] | None = Field(
        None,
        description="a rack of some of its blocks: every so many-th (2: 0, 2, 4, ...), or a list of their numbers, "
        "lowest first ([0, 2, 5]); null: all of them",
    )


class DistillationConfig(Section):
    """A teacher that the stages are drawn to, beside what they learn by themselves."""

    teacher: Annotated[Text, Field(min_length=1)] | None = Field(
        None,
        description="directory of the teacher (a Hugging Face directory or an export), of the same tokens; null: none",
    )
    match: Literal["mse", "cosine", "both", "none"] = Field(
        "mse", description="how a stage of some blocks is drawn to the teacher's hidden states, normed; none: it is not"
    )
    at: list[Count] | None = Field(
        None, description="the teacher's depth (blocks below) for each stage; null: as far up as the stage is"
    )
    task_weight: NonNegative = Field(
        0.5, description="weight of the objective beside the teacher's; 0: the teacher's alone is trained to"
    )
    top_k: Annotated[int, Field(ge=1, le=4096)] = Field(
        64, description="the teacher's likeliest tokens that are kept of each position, for a stage of all blocks"
    )
    temperature: Positive = Field(1.0, description="softens both distributions over these tokens")


class StageOverrides(Section):
    """What one stage does differently: only the keys that were set count."""

    precision: StackPrecision | None = Field(
        None,
        description="precision that the blocks which are new with the stage train in; null: in progressive training "
        "new_stack_precision, else the run's",
    )
    training: StageTraining = Field(default_factory=StageTraining)


class Settings(Section):
    """Every setting of a run, and what follows from them."""

    name: str = Field(
        "stackwise", pattern=NAME, max_length=200, description="name of the run: letters, digits, dots, dashes"
    )
    seed: Count = Field(0, description="every random draw follows from it")
    device: str = Field("auto", pattern=DEVICE, description="auto, cuda, cuda:N, mps, cpu")
    precision: Precision = Field(
        "auto",
        description="fp32, or autocast to bf16 or fp16; fp64 to compare with others; auto: bf16 on a GPU that has it",
    )
    deterministic: bool = Field(True, description="only kernels that repeat bit for bit (on a GPU somewhat slower)")
    init: InitConfig = Field(default_factory=InitConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    store: StoreConfig = Field(default_factory=StoreConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)
    distillation: DistillationConfig = Field(default_factory=DistillationConfig)
    tune: TuneConfig = Field(default_factory=TuneConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    stages: dict[Count, StageOverrides] = Field(
        default_factory=dict,
        description="what single stages do differently, as {2: {precision: fp8, training: {learning_rate: 1e-3}}}",
    )

    _unused: list[Text] = PrivateAttr(default_factory=list)

    def __eq__(self, other: object) -> bool:
        """Whether all settings are alike, however they were written."""
        return isinstance(other, Settings) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    @property
    def unused(self) -> list[Text]:
        """One line for each setting of the file or command line that has no place in this configuration."""
        return self._unused

    @unused.setter
    def unused(self, lines: list[Text]) -> None:
        self._unused = lines

    @property
    def objective(self) -> Objective:
        """The training objective."""
        return self.training.objective

    @property
    def swap_undivided(self) -> str | None:
        """Why ranks cannot divide a stage that is swapped, and what to do; None: they can."""
        parallel, training = self.parallel, self.training
        stages = [self.stage_training(depth) for depth in range(self.n_stages)]
        whys = {
            "parallel.data alone divides a swapped stage: leave shard, tensor and pipeline out": parallel.divides,
            "gradients of a swapped stage travel as they are: set parallel.compression: none": (
                parallel.compression != "none"
            ),
            "an optimizer that needs more than a slice of a parameter cannot be divided: take adamw": not all(
                settings.optimizer.divides for settings in stages
            ),
            "experts are swapped by one process: leave parallel out": bool(
                self.model.total(lambda model: len(model.ffn.pieces(model)))
            ),
            "columns are swapped by one process: leave parallel out": self.model.stream.columns > 1,
            "adapters, and stacks in a format of their own, are swapped by one process: leave parallel out": (
                training.adapters is not None
                or training.progressive.enabled
                or any(settings.quantization is not None for settings in stages)
                or any(overrides.precision is not None for overrides in self.stages.values())
            ),
        }
        return next((why for why, holds in whys.items() if holds), None)

    @property
    def row_positions(self) -> int:
        """Positions of a row of activations: with diffusion in blocks it is a noised and a clean copy of the sample."""
        return self.objective.positions(self.training.seq_len)

    @property
    def time_as_depth(self) -> bool:
        """Whether stage k trains on its own window of masked fractions alone."""
        return (self.training.mask_schedule_over == "depth" and not self.training.plan.joint) or self.stands_apart

    @property
    def has_windows(self) -> bool:
        """Whether rows can be trained in windows: where some stage reads a boundary, whose size they are to bound.

        Or where sections train in turn: a window is then a round. Or where each window answers prompts of its own, or
        has its rows ordered by what the stage says of them when it begins.
        """
        if self.objective.rolls_out:
            return True
        curriculum = self.training.curriculum
        if curriculum is not None and curriculum.by == "loss" and self.n_sections == 1 and not self.grows:
            return not (self.training.plan.whole or self.fresh_masks)
        if self.training.plan.whole:
            return self.n_sections > 1
        from_tokens = self.training.progressive.holds_trunk or self.stands_apart or self.grows
        return self.n_sections > 1 and not from_tokens  # else no boundary is written that windows could bound

    @property
    def tasks_in_turn(self) -> bool:
        """Whether tasks are learned one after the other."""
        return self.training.continual.sequential

    @property
    def windows(self) -> int:
        """Windows that the rows are trained in; 1 until `auto` is settled. Of tasks in turn each is one."""
        if self.tasks_in_turn:
            return max(1, len(self.data.tasks))
        return max(1, self.training.windows) if self.has_windows else 1

    @property
    def fresh_masks(self) -> bool:
        """Whether each stage trains on rows of its own."""
        return (self.training.fresh_masks and not self.training.plan.joint) or self.training.plan.own_rows

    @property
    def boundary_every(self) -> int:
        """Every how-many-th boundary is stored; with as many as there are stages, none is."""
        progressive = self.training.progressive
        if progressive.enabled and progressive.cache_activations is False:
            return max(self.n_stages, self.store.every)  # a stride beyond the last stage: none is stored
        return self.store.every

    def stores_boundary(self, depth: int) -> bool:
        """Whether the boundary that enters stage `depth` is one of those that are stored."""
        number = depth + (self.bottom > 0)  # the lowest is the first, also where it enters stage 0
        return number % self.boundary_every == 0

    @property
    def partition(self) -> list[tuple[int, int]]:
        """First and last block of each part of the rack that becomes new with a stage, lowest first."""
        spans = self.training.plan.partition(self.model)
        bottom = self.bottom
        return [(max(first, bottom), last) for first, last in spans if last >= bottom]

    @property
    def bottom(self) -> int:
        """The lowest block of any stage; those below it are frozen, and what leaves them is stored."""
        adapters = self.training.adapters
        return 0 if adapters is None else min(adapters.above, self.model.n_blocks - 1)

    @property
    def finds_block_size(self) -> bool:
        """Whether the stages' size is still to be found."""
        return self.training.plan.finds_size

    @property
    def n_sections(self) -> int:
        """Stages that each train a section of the rack."""
        return len(self.partition)

    @property
    def fusions(self) -> list[tuple[int, int]]:
        """First and last block of each stage that trains sections together afterwards, in order."""
        sections = self.partition
        if len(sections) == 1 or self.training.plan.joint:  # the whole rack has trained already
            return []
        return self.training.fusion.groups(sections)

    @property
    def joint_share(self) -> float | None:
        """The share of all steps that a last stage takes over, of sections together; None: it has its own."""
        return getattr(self.training.fusion, "share", None) if len(self.fusions) == 1 else None

    @property
    def n_stages(self) -> int:
        """Stages in the schedule."""
        return self.n_sections + len(self.fusions) + self.adapts

    @property
    def adapts(self) -> bool:
        """Whether a last stage turns the rack causal."""
        return isinstance(self.training.adaptation, CausalAdaptation)

    @property
    def own_order(self) -> str | None:
        """The setting that orders rows, or draws them, in a way of its own; None: there is none."""
        settings = [self.stage_training(depth) for depth in range(self.n_stages)]
        with_their_own = {
            "objective": self.objective.rolls_out,
            "continual": self.tasks_in_turn,
            "meta": any(one.meta is not None for one in settings),
            "curriculum": any(one.curriculum is not None for one in settings),
            "routes": any(one.routes is not None for one in settings),
        }
        return next((f"training.{key}" for key, has_one in with_their_own.items() if has_one), None)

    def uses_held_out(self, depth: int) -> bool:
        """Whether what stage `depth` commits depends on held-out loss."""
        fused = self.n_sections <= depth < self.n_sections + len(self.fusions)
        return (fused and self.training.fusion.probes) or self.stage_training(depth).uses_held_out

    def stage_training(self, depth: int) -> StageTraining:
        """How stage `depth` trains: the defaults of `training`, with its own overrides."""
        overrides = self.stages.get(depth)
        values = {name: getattr(self.training, name) for name in StageTraining.model_fields}
        adaptation, fusion = self.training.adaptation, self.training.fusion
        if isinstance(adaptation, CausalAdaptation) and depth == self.n_stages - 1:
            values["steps"] = adaptation.steps or values["steps"]
        elif fusion.budget is not None and depth >= self.n_sections:  # the budget is shared by the fusion stages
            values["steps"] = max(1, fusion.budget // len(self.fusions))
        grown = self.training.grown
        if grown is not None and depth == len(grown.phases) and values["decay"] is None:
            left = round(1.0 - grown.phases[-1].until, 9)  # nothing falls before the last expansion
            values["decay"] = left if left < 0.2 else None
        if overrides is not None:
            # only what was set, so that defaults of the run count
            values |= {name: getattr(overrides.training, name) for name in overrides.training.model_fields_set}
        return StageTraining(**values)

    @property
    def grows(self) -> bool:
        """Whether each stage trains all the blocks so far."""
        return self.training.plan.grows

    @property
    def prepends(self) -> bool:
        """Whether stacks are added below those there are."""
        return self.training.progressive.prepends

    @property
    def stands_apart(self) -> bool:
        """Whether no section of the rack stands on another."""
        return self.training.plan.apart
