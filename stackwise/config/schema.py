"""Every setting: its type, its default, what it means. The YAML maps onto these classes one to one.

A field's description is its documentation: `stackwise init` writes it as the comment above the key.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidatorFunctionWrapHandler, WrapValidator

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Auto(int):
    """A number that is still to be found; 0 until then."""


AUTO = _Auto(0)
"""What `auto` is read as where a number stands otherwise: it is settled before anything is done with it."""


def _number_or_auto(value: Any, handler: ValidatorFunctionWrapHandler) -> int:
    return AUTO if value == "auto" or isinstance(value, _Auto) else int(handler(value))


AutoInt = Annotated[
    PositiveInt,
    WrapValidator(_number_or_auto),
    PlainSerializer(lambda value: "auto" if isinstance(value, _Auto) else value, return_type=int | str),
]

Mode = Literal["layerwise", "blockwise", "fused", "independent", "end_to_end"]
Objective = Literal["mask_diffusion", "mlm", "clm", "custom"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
StackPrecision = Literal["full", "fp32", "half", "fp16", "bfloat16", "bf16", "fp8", "nvfp4", "fp4", "qlora"]
STACK_PRECISION: dict[str, Precision] = {
    "fp32": "fp32", "half": "fp16", "fp16": "fp16", "bfloat16": "bf16", "bf16": "bf16",
}  # fmt: skip
"""What a stack's precision is in words of `precision`; full is whatever `precision` says."""
Codec = Literal[
    "bf16", "bf16-blosc", "bf16-zstd", "fp16", "fp16-blosc", "fp16-zstd", "fp32", "fp32-blosc", "fp32-zstd",
    "fp8", "fp8-blosc", "fp8-zstd", "int8", "int8-blosc", "int8-zstd",
]  # fmt: skip


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
DEVICE = r"^(auto|cpu|mps|cuda(:\d+)?)$"
PATTERNS = {NAME: "letters, digits, dots and dashes", DEVICE: "one of auto, cuda, cuda:N, mps, cpu"}
"""Patterns of text fields, and what they allow in words."""


MLA_SETTINGS = ("kv_rank", "q_rank", "rope_head_dim")
LINEAR_SETTINGS = ("feature_map", "random_features")
TIME_KNOTS = 65
"""Shares of masked positions that a learned time embedding has a vector for, evenly from 0 to 1."""


class Section(BaseModel):
    """A part of the configuration: unknown keys and wrong types are refused, also on assignment."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True, protected_namespaces=())


class ArchitectureConfig(Section):
    """How blocks make stacks, and stacks the rack."""

    n_stacks: PositiveInt | None = Field(None, description="stacks in the rack; null: training.progressive.max_stacks")
    blocks_per_stack: PositiveInt = Field(1, description="blocks (transformer layers) in a stack")


class ModelConfig(Section):
    """The rack: front, blocks, head."""

    vocab_size: PositiveInt | None = Field(None, description="token ids that the model knows; null: the tokenizer's")
    d_model: PositiveInt = Field(256, description="width of the residual stream")
    n_heads: PositiveInt = Field(4, description="attention heads; they divide d_model")
    n_kv_heads: PositiveInt | None = Field(
        None, description="key and value heads (grouped-query attention); null: n_heads"
    )
    d_ff: PositiveInt | None = Field(
        None, description="width inside the feed-forward; null: 4 d_model (gelu), 8/3 d_model rounded up to 32 (swiglu)"
    )
    architecture: ArchitectureConfig = Field(default_factory=lambda: ArchitectureConfig())
    attention: Literal["mha", "gqa", "mla", "linear"] | None = Field(
        None,
        description="mha (multi-head), gqa (grouped-query), mla (multi-head latent), linear (a feature map for the "
        "softmax); null: mha, or gqa where n_kv_heads is less than n_heads",
    )
    kv_rank: PositiveInt | None = Field(
        None, description="mla: width of the latent of keys and values; null: 4 heads' width, at most d_model"
    )
    q_rank: PositiveInt | None = Field(None, description="mla: width of the queries' latent; null: no compression")
    rope_head_dim: PositiveInt | None = Field(
        None, description="mla: rotary part of a head, even; null: half a head's width"
    )
    feature_map: Literal["elu", "relu", "performer"] = Field(
        "elu", description="linear: elu + 1, relu, or performer (random features of the softmax)"
    )
    random_features: PositiveInt | None = Field(
        None, description="linear with performer: number of features; null: a head's width"
    )
    time_embedding: Literal["none", "sinusoidal", "learned"] = Field(
        "none", description="embedding of the masked share of a row, added by the front"
    )
    time_embedding_dim: PositiveInt = Field(256, description="width of the time embedding before it meets d_model")
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="normalisation")
    norm_eps: Positive = Field(1e-5, description="added to the variance inside a norm")
    positions: Literal["rope", "learned"] = Field("rope", description="rotary, or a learned table added by the front")
    rope_theta: Positive = Field(10_000.0, description="base of the rotary wavelengths")
    ffn: Literal["swiglu", "gelu"] = Field("swiglu", description="feed-forward")
    bias: bool = Field(False, description="biases in linear layers")
    dropout: Probability = Field(0.0, description="dropout after attention and feed-forward, in training")
    tie_embeddings: bool = Field(True, description="the token embedding, transposed, as output projection")
    max_seq_len: PositiveInt | None = Field(None, description="longest sample the model takes; null: training.seq_len")
    init_std: Positive = Field(0.02, description="standard deviation of fresh weights")

    @property
    def n_blocks(self) -> int:
        """Blocks in the whole rack."""
        return (self.architecture.n_stacks or 1) * self.architecture.blocks_per_stack

    @property
    def kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def ffn_width(self) -> int:
        """Width inside the feed-forward, resolved."""
        if self.d_ff is not None:
            return self.d_ff
        return 4 * self.d_model if self.ffn == "gelu" else -(-8 * self.d_model // 3 // 32) * 32

    @property
    def latent_rank(self) -> int:
        """Width of the latent of keys and values (mla), resolved: DeepSeek-V2's is four heads wide."""
        return self.kv_rank or min(4 * self.head_dim, self.d_model)

    @property
    def rotary_width(self) -> int:
        """Rotary part of a head (mla), resolved; 0 where positions are learned."""
        if self.positions != "rope":
            return 0
        return self.rope_head_dim or max(2, self.head_dim // 4 * 2)

    @property
    def attention_parameters(self) -> int:
        """Parameters in one block's attention."""
        d, kv, bias = self.d_model, self.kv_heads * self.head_dim, int(self.bias)
        if self.attention != "mla":
            return 2 * d * d + 2 * d * kv + bias * (2 * d + 2 * kv)
        rank, turned, inner = self.latent_rank, self.rotary_width, self.q_rank or d
        queries = inner * (d + self.n_heads * turned) + (d * self.q_rank + self.q_rank if self.q_rank else 0)
        keys = d * (rank + turned) + rank + 2 * rank * d
        return queries + keys + d * d + bias * d

    @property
    def block_parameters(self) -> int:
        """Parameters in one block."""
        d, f, gated = self.d_model, self.ffn_width, self.ffn == "swiglu"
        ffn = (3 if gated else 2) * d * f + int(self.bias) * (d + f * (2 if gated else 1))
        return self.attention_parameters + ffn + 2 * d * (2 if self.norm == "layernorm" else 1)

    @property
    def time_parameters(self) -> int:
        """Parameters of the front's time embedding."""
        if self.time_embedding == "none":
            return 0
        width, d = self.time_embedding_dim, self.d_model
        return width * d + d + d * d + d + (TIME_KNOTS * width if self.time_embedding == "learned" else 0)

    def specification(self) -> dict[str, Any]:
        """What of it shapes a forward pass beside the weights; settings without effect are left out.

        Settings that came later are in only where they say something: what was identified before keeps its id.
        """
        later = {"attention", *MLA_SETTINGS, *LINEAR_SETTINGS, "time_embedding", "time_embedding_dim"}
        own = self.model_dump(exclude={"architecture", "init_std", "dropout", "tie_embeddings", *later})
        if self.attention == "mla":
            own |= {"attention": "mla", "kv_rank": self.latent_rank, "q_rank": self.q_rank}
            own["rope_head_dim"] = self.rotary_width
        if self.attention == "linear":
            own |= {"attention": "linear", "feature_map": self.feature_map}
            if self.feature_map == "performer":
                own["random_features"] = self.random_features or self.head_dim
        if self.time_embedding != "none":
            own |= {"time_embedding": self.time_embedding, "time_embedding_dim": self.time_embedding_dim}
        return own


class DataConfig(Section):
    """The text: where it is, how it becomes tokens, what is held out."""

    paths: list[str] = Field(
        default_factory=list,
        description="files and folders of text, jsonl, parquet, Hugging Face data sets, or one prepared data set; "
        "empty: the Python standard library on this machine",
    )
    text_column: str = Field("text", description="column of jsonl, parquet and data set rows that holds the text")
    tokenizer: str = Field(
        "bpe", description="bpe (byte-level, trained on the text once), bytes, or the path of a tokenizer.json"
    )
    vocab_size: PositiveInt | None = Field(
        None, description="size that bpe is trained to; null: model.vocab_size, else 4096"
    )
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.05, description="share of the documents held out from training, chosen by their content"
    )
    max_bytes: PositiveInt | None = Field(None, description="read at most so many bytes of text; null: all of it")
    within_documents: bool = Field(False, description="attention stays within a document")
    cache_dir: str | None = Field(
        None, description="where prepared data and tokenizers are kept; null: the user's cache directory"
    )


class StageTraining(Section):
    """How one stage trains. Each of these can be set for one stage: `stages.K.training.KEY`."""

    steps: PositiveInt | None = Field(
        None, description="optimizer steps of a stage; null: by tokens or epochs_per_layer"
    )
    tokens: PositiveInt | None = Field(
        None, description="tokens that a stage trains on, where steps is null; null: by epochs_per_layer"
    )
    epochs_per_layer: Positive = Field(1.0, description="passes of a stage over its rows, where steps is null")
    batch_size: AutoInt = Field(8, description="rows in a microbatch; auto: as many as fit in memory, found by trial")
    accumulation: PositiveInt = Field(1, description="microbatches in a step")
    optimizer: Literal["adamw", "muon", "adamw8bit"] = Field(
        "adamw", description="adamw, muon (blocks' matrices; adamw for the rest), adamw8bit (moments in 8 bits)"
    )
    learning_rate: Positive = Field(1e-3, description="peak learning rate")
    block_learning_rates: dict[Count, Positive] = Field(
        default_factory=dict, description="peak learning rates of single blocks, by their number in the rack: {3: 1e-4}"
    )
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="shape after warm-up; wsd holds, then falls over the last fifth"
    )
    min_learning_rate: NonNegative = Field(0.1, description="where the schedule ends, as a share of the peak")
    warmup: Annotated[float, Field(ge=0.0, le=1.0)] = Field(0.05, description="share of the steps that warm up")
    weight_decay: NonNegative = Field(0.1, description="AdamW's, on matrices alone")
    beta1: Probability = Field(0.9, description="AdamW's first decay rate")
    beta2: Probability = Field(0.95, description="AdamW's second decay rate")
    adam_eps: Positive = Field(1e-8, description="AdamW's epsilon")
    muon_momentum: Probability = Field(0.95, description="Muon's momentum")
    grad_clip: NonNegative = Field(1.0, description="largest global gradient norm; 0: no clipping")
    loss_scale: Literal["dynamic"] | Positive = Field(
        "dynamic", description="precision fp16: factor on the loss before gradients are taken; dynamic finds it"
    )
    ema: Probability = Field(
        0.0, description="decay of a running mean of the weights, which is then what is committed; 0: none"
    )
    eval_every: PositiveInt | None = Field(
        None, description="steps between evaluations on held-out rows inside a stage; null: none"
    )
    patience: PositiveInt | None = Field(
        None, description="end a stage after so many evaluations without a lower held-out loss; null: never"
    )
    keep_best: bool = Field(False, description="commit the weights of the evaluation with the lowest held-out loss")
    on_divergence: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="at a loss or gradient that is no number, or (skip, rollback) a loss that explodes: stop, skip the "
        "step, or go back to the last checkpoint by steps with a lower learning rate",
    )
    divergence_factor: Annotated[float, Field(gt=1.0, allow_inf_nan=False)] = Field(
        3.0, description="a loss explodes above so many times the median of the last 32"
    )
    divergence_limit: PositiveInt = Field(5, description="skips or rollbacks of a stage before it is given up")
    rollback_factor: Fraction = Field(0.5, description="factor on the learning rate at each rollback")

    @property
    def heeds_held_out(self) -> bool:
        """Whether what is committed depends on held-out loss."""
        return self.patience is not None or self.keep_best

    def budget(self, seq_len: int) -> int | None:
        """Steps by `steps` or `tokens`; None: `epochs_per_layer` says."""
        if self.steps is not None or self.tokens is None or not self.batch_size:
            return self.steps
        return max(1, round(self.tokens / (self.batch_size * self.accumulation * seq_len)))


class QLoRAConfig(Section):
    """Adapters of one stack (`training.progressive.qlora_configs`)."""

    rank: PositiveInt = Field(16, description="rank of the adapter")
    alpha: Positive = Field(32.0, description="its scale is alpha / rank")


class ProgressiveConfig(Section):
    """Progressive training: the rack grows stack by stack. Where enabled, it wins over `training.mode`."""

    enabled: bool = Field(False, description="grow the rack stack by stack")
    trunk_strategy: Literal["frozen", "qlora"] = Field("frozen", description="what happens to the stacks below")
    trunk_precision: StackPrecision | None = Field(
        None,
        description="what the stacks made before are held in where a stage holds them: fp8, nvfp4, qlora (nf4), full; "
        "null: qlora under trunk_strategy qlora, else as they were trained",
    )
    new_stack_precision: StackPrecision = Field("full", description="precision of the stack in training")
    cache_activations: bool = Field(True, description="read boundaries from the store instead of recomputing them")
    qlora_enabled: bool = Field(False, description="adapters on each stack as it is made")
    qlora_rank: PositiveInt = Field(16, description="their rank")
    qlora_alpha: Positive = Field(32.0, description="their alpha")
    qlora_strategy: Literal["simplified", "progressive", "variable"] = Field(
        "simplified", description="the same adapters everywhere, a pattern over stacks, or qlora_configs"
    )
    qlora_rank_pattern: Literal["increasing", "decreasing", "linear", "constant"] = Field(
        "constant", description="ranks over stacks"
    )
    qlora_alpha_pattern: Literal["increasing", "decreasing", "linear", "constant"] = Field(
        "constant", description="alphas over stacks"
    )
    qlora_configs: dict[int, QLoRAConfig] = Field(default_factory=dict, description="adapters by stack")
    progressive_qlora: bool = Field(False, description="adapters on the whole trunk when a stack is added")
    progressive_qlora_rank: PositiveInt = Field(8, description="their rank")
    progressive_qlora_alpha: Positive = Field(16.0, description="their alpha")
    max_stacks: PositiveInt | None = Field(None, description="stacks to grow to, where n_stacks is null")
    building_mode: Literal["append", "prepend"] = Field("append", description="new stacks above, or below")
    time_interpretation: Literal["input", "depth"] | None = Field(
        None, description="depth: stage k trains on the rows whose masked fraction is its own"
    )
    time_embedding_dim: PositiveInt = Field(512, description="width of the time embedding (time as input)")
    time_encoding_type: Literal["sinusoidal", "learned"] = Field("sinusoidal", description="its kind")
    stack_time_mapping: Literal["linear", "exponential", "custom"] = Field(
        "linear", description="fraction by depth (time as depth)"
    )
    time_per_stack: PositiveInt = Field(100, description="time steps a stack (time as depth)")
    training_objective: Objective | None = Field(None, description="overrides training.objective")


class FusionConfig(Section):
    """Stages that train sections of the rack together, after they were trained one by one."""

    strategy: Literal["none", "frozen", "trainable", "hierarchical"] = Field(
        "none",
        description="frozen (the head alone, over the finished rack), trainable (the whole rack), hierarchical "
        "(neighbours first, then pairs of pairs, up to the whole)",
    )
    steps: PositiveInt | None = Field(
        None, description="optimizer steps in all, shared by these stages; null: as many as a stage each"
    )


class TrainingConfig(StageTraining):
    """Mode, objective and masks, and the defaults of every stage's training."""

    mode: Mode = Field("blockwise", description="the schedule: layerwise, blockwise, fused, independent, end_to_end")
    block_size: PositiveInt = Field(4, description="blocks in a stage (blockwise, fused)")
    n_stages: PositiveInt | None = Field(None, description="number of stages instead of block_size")
    fusion_mode: Literal["frozen", "trainable"] = Field("frozen", description="what fused does with the blocks below")
    objective: Objective = Field("mask_diffusion", description="mask_diffusion, mlm, clm (causal), custom (targets)")
    seq_len: PositiveInt = Field(512, description="tokens in a sample")
    rows: PositiveInt | None = Field(
        None, description="rows (sample under a mask) of every boundary; null: what steps need, at most the corpus"
    )
    min_mask_fraction: Fraction = Field(0.15, description="smallest share of positions masked")
    max_mask_fraction: Fraction = Field(0.90, description="largest share of positions masked")
    mask_schedule_type: Literal["linear", "exponential", "cosine"] = Field(
        "linear", description="how fractions run from smallest to largest"
    )
    mask_schedule_over: Literal["time", "depth"] = Field(
        "time", description="time: every stage sees all fractions; depth: stage k trains on its own window of them"
    )
    mask_windows: list[Annotated[list[float], Field(min_length=2, max_length=2)]] | None = Field(
        None,
        description="masked fractions of each stage as [from, to], lowest stage first, where they go over depth; they "
        "may overlap; null: equal parts of the schedule",
    )
    fresh_masks: bool = Field(
        False, description="new samples and masks for each stage, made by forward passes; else the same at every depth"
    )
    loss_weight: Literal["none", "inverse_time"] = Field(
        "none", description="none: each scored position counts the same; inverse_time: each sample does (1/t)"
    )
    diffusion_block: PositiveInt | None = Field(
        None,
        description="mask_diffusion in blocks of so many tokens, each given the clean ones before it; generation then "
        "keeps a cache. Rows are twice as long. null: attention over the whole sample",
    )
    masks_per_sample: PositiveInt = Field(1, description="masks that each sample is seen under, at every depth")
    mask_pool: Count = Field(0, description="distinct masks to draw from; 0: a fresh one for each row")
    mask_token_id: Count | None = Field(None, description="id shown at masked positions; null: the tokenizer's")
    lookahead: Literal["none", "auxiliary", "overlap", "tail"] = Field(
        "none",
        description="blocks between a stage's own and its head, training along: auxiliary (thrown away), overlap "
        "(those of the next stage, which trains them again), tail (the rack's last ones, shared by every stage)",
    )
    lookahead_blocks: PositiveInt = Field(1, description="how many blocks that is")
    tied_head: Literal["copy", "frozen"] = Field(
        "copy", description="a tied projection above stage 0: a trainable copy of the embedding, or frozen"
    )
    mlm_mask: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.8, description="mlm: share of selected positions that show the mask token"
    )
    mlm_random: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.1, description="mlm: share that shows a random token; the rest shows itself"
    )
    compile: bool = Field(False, description="torch.compile the blocks")
    swap: Literal["auto", "always", "never"] = Field(
        "auto", description="swap a stage's parts between disk and memory; auto: where it does not fit. Same result"
    )
    swap_parts: PositiveInt | None = Field(
        None, description="groups that a swapped stage's blocks take turns in; null: as few as fit"
    )
    memory: PositiveInt | None = Field(
        None, description="bytes of memory that a stage may take before it is swapped; null: the device's"
    )
    checkpoint_steps: PositiveInt | None = Field(None, description="checkpoint every so many steps; null: by minutes")
    checkpoint_minutes: Positive = Field(10.0, description="checkpoint every so many minutes")
    keep_checkpoints: PositiveInt = Field(2, description="checkpoints of a stage that are kept; the best one beside")
    log_every: PositiveInt = Field(
        10, description="steps between plain log lines, at least; they come every few seconds"
    )
    cache_mode: Literal["layerwise", "fusion"] | None = Field(None, description="implied by mode; accepted, unused")
    cache_dir: str | None = Field(None, description="another name of store.path")
    fusion_evaluation: bool = Field(False, description="implied: every run evaluates the fused rack; unused")
    save_fused_checkpoints: bool = Field(False, description="export the fused rack into the run directory at the end")
    fusion: FusionConfig = Field(default_factory=lambda: FusionConfig())
    progressive: ProgressiveConfig = Field(default_factory=lambda: ProgressiveConfig())


class StoreConfig(Section):
    """The activation store."""

    path: str | None = Field(None, description="directory of the store; null: `store` in the run directory")
    keep: Literal["all", "none"] | Count = Field(
        "all", description="boundaries kept beside those being read and written: a number, all, none"
    )
    codec: Codec | None = Field(None, description="how activations are stored; null: bf16")
    max_bytes: PositiveInt | None = Field(None, description="most bytes that boundaries may take; null: the disk")
    chunk_bytes: PositiveInt = Field(8 << 20, description="about the size of a chunk")
    every: PositiveInt = Field(
        1, description="store every so-many-th boundary; stages between recompute theirs, in memory, from the one below"
    )
    fuse_passes: bool = Field(
        False,
        description="make a boundary while the stage above trains on it, not in a pass before: it is read once less, "
        "and the stage below stays in memory, frozen",
    )


class EvaluationConfig(Section):
    """Held-out evaluation after the last stage."""

    fractions: list[Fraction] = Field(
        default_factory=lambda: [0.15, 0.5, 0.9], description="masked shares at which loss and accuracy are measured"
    )
    samples: PositiveInt = Field(128, description="held-out samples used, at most")
    batch_size: PositiveInt = Field(16, description="samples in a batch")


class TrackingConfig(Section):
    """Where figures go as training runs, beside the run's own log. Keys and tokens come from the environment."""

    tensorboard: bool = Field(True, description="TensorBoard event files in the run directory")
    wandb: Literal["offline", "online", False] = Field(
        False, description="Weights & Biases: online, offline (kept in the run directory, to sync later), or false"
    )
    mlflow: str | Literal[False] = Field(
        False, description="MLflow: the URI of a server or a database, or a directory; or false"
    )
    project: str = Field("stackwise", min_length=1, description="W&B project, MLflow experiment")
    group: str | None = Field(None, description="W&B group, MLflow tag; null: none, in a sweep the sweep's name")
    name: str | None = Field(None, description="what the run is called there; null: its directory's name")


class SlurmConfig(Section):
    """What a job asks for (`stackwise run --engine slurm`); it changes no result."""

    partition: str | None = Field(None, description="partition; null: the cluster's default")
    nodelist: str | None = Field(None, description="the node that has the store; null: the machine that submits")
    minutes: PositiveInt = Field(1440, description="time limit of a job; one that reaches it saves and is queued again")
    signal_seconds: PositiveInt = Field(120, description="seconds before the limit that a job is told to save")
    gpus: Count | None = Field(None, description="GPUs of a job; null: 1, or none where device is cpu")
    cpus: PositiveInt | None = Field(None, description="CPUs of a job; null: the cluster's default")
    memory_gb: Positive | None = Field(None, description="memory of a job, in GB; null: the cluster's default")
    account: str | None = Field(None, description="account; null: the user's default")
    qos: str | None = Field(None, description="quality of service; null: the user's default")
    parameters: dict[str, str | int | bool] = Field(
        default_factory=dict, description="further options of sbatch by name, as {constraint: nvme}"
    )


class StageOverrides(Section):
    """What one stage does differently: only the keys that were set count."""

    precision: StackPrecision | None = Field(
        None, description="precision of the blocks that are new with the stage; null: new_stack_precision"
    )
    training: StageTraining = Field(default_factory=StageTraining)


class Settings(Section):
    """Every setting of a run, and what follows from them."""

    name: str = Field("stackwise", pattern=NAME, description="name of the run: letters, digits, dots, dashes")
    seed: Count = Field(0, description="every random draw follows from it")
    device: str = Field("auto", pattern=DEVICE, description="auto, cuda, cuda:N, mps, cpu")
    precision: Precision = Field(
        "auto", description="fp32, or autocast to bf16 or fp16; auto: bf16 on a GPU that has it"
    )
    deterministic: bool = Field(True, description="only kernels that repeat bit for bit (on a GPU somewhat slower)")
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    store: StoreConfig = Field(default_factory=StoreConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)
    stages: dict[Count, StageOverrides] = Field(default_factory=dict, description="what single stages do differently")

    @property
    def objective(self) -> Objective:
        """The training objective in force."""
        progressive = self.training.progressive
        return (progressive.training_objective if progressive.enabled else None) or self.training.objective

    @property
    def row_positions(self) -> int:
        """Positions of a row of activations: with diffusion in blocks it is a noised and a clean copy of the sample."""
        return self.training.seq_len * (1 if self.training.diffusion_block is None else 2)

    @property
    def time_as_depth(self) -> bool:
        """Whether stage k trains on its own window of masked fractions alone."""
        progressive = self.training.progressive
        if progressive.enabled:
            return self.training.mask_schedule_over == "depth" or progressive.time_interpretation == "depth"
        return self.training.mask_schedule_over == "depth" or self.training.mode == "independent"

    @property
    def fresh_masks(self) -> bool:
        """Whether each stage trains on rows of its own."""
        training = self.training
        fused = training.mode == "fused" and training.fusion_mode == "frozen" and not training.progressive.enabled
        return training.fresh_masks or fused

    @property
    def mask_schedule_type(self) -> Literal["linear", "exponential", "cosine"]:
        """The shape of the mask schedule in force."""
        progressive = self.training.progressive
        if progressive.enabled and "stack_time_mapping" in progressive.model_fields_set:
            return "exponential" if progressive.stack_time_mapping == "exponential" else "linear"
        return self.training.mask_schedule_type

    @property
    def boundary_every(self) -> int:
        """Every how-many-th boundary is stored; with as many as there are stages, none is."""
        progressive = self.training.progressive
        if progressive.enabled and not progressive.cache_activations:
            return max(self.n_stages, self.store.every)
        return self.store.every

    @property
    def partition(self) -> list[tuple[int, int]]:
        """First and last block of each part of the rack that becomes new with a stage, lowest first."""
        training, n_blocks = self.training, self.model.n_blocks
        if training.progressive.enabled:
            size = self.model.architecture.blocks_per_stack
        elif training.mode in ("layerwise", "end_to_end"):
            size = 1 if training.mode == "layerwise" else n_blocks
        elif training.n_stages is not None:
            n = min(training.n_stages, n_blocks)
            edges = [n_blocks * k // n for k in range(n + 1)]
            return [(first, end - 1) for first, end in itertools.pairwise(edges)]
        else:
            size = training.block_size
        return [(first, min(first + size, n_blocks) - 1) for first in range(0, n_blocks, size)]

    @property
    def n_sections(self) -> int:
        """Stages that each train a section of the rack."""
        return len(self.partition)

    @property
    def fusions(self) -> list[tuple[int, int]]:
        """First and last block of each stage that trains sections together afterwards, in order."""
        level, strategy, groups = self.partition, self.training.fusion.strategy, []
        if strategy == "none" or len(level) == 1:
            return []
        if strategy == "frozen":
            return [level[-1]]
        if strategy == "trainable":
            return [(0, self.model.n_blocks - 1)]
        while len(level) > 1:
            pairs = [level[start : start + 2] for start in range(0, len(level), 2)]
            level = [(pair[0][0], pair[-1][1]) for pair in pairs]
            groups += [group for group, pair in zip(level, pairs, strict=True) if len(pair) == 2]
        return groups

    @property
    def n_stages(self) -> int:
        """Stages in the schedule."""
        return self.n_sections + len(self.fusions)

    def stage_training(self, depth: int) -> StageTraining:
        """How stage `depth` trains: the defaults of `training`, with its own overrides."""
        own = self.stages.get(depth)
        values = {name: getattr(self.training, name) for name in StageTraining.model_fields}
        if depth >= self.n_sections and self.training.fusion.steps is not None:
            values["steps"] = max(1, self.training.fusion.steps // len(self.fusions))
        if own is not None:
            values |= own.training.model_dump(exclude_unset=True)
        return StageTraining(**values)
