"""Models beside a run (a teacher, a reference, what scores answers): which of their numbers a stage reads, by content.

They are boundaries like any other, of the same rows under the same masks, written before the stage trains: hidden
states at a depth, or the likeliest tokens. One that is there is found again by any stage, run or sweep.
So are answers that a rack draws itself, one row a prompt: the tokens with what the policy said of them, what the
reference says of them, and the scores; a kill costs a part of one. No torch is imported here before something is to be
written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.kinds import Score
from stackwise.config.model import ModelConfig
from stackwise.config.schema import DistillationConfig
from stackwise.data import PreparedData
from stackwise.data.prepared import TOKENIZER
from stackwise.data.tokenizer import Tokenizer
from stackwise.errors import UsageError, under
from stackwise.files import expanded
from stackwise.identity import Hex, content_id
from stackwise.pipeline.job import Source, Versions
from stackwise.pipeline.recipe import forward_specification, lossless_codec, trunk_id
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.schedule import FRONT, HEAD, Stage, block_part
from stackwise.pretrained.adapters import is_adapter
from stackwise.pretrained.checkpoint import Checkpoint

TEACHER, LOGITS, REFERENCE, DIFFICULTY = "teacher", "teacher_logits", "reference", "difficulty"
"""The inputs of a batch (see `objectives.distillation`, `objectives.preferences`, `training.curriculum`)."""
SCORES = "scores"  # names, beside REFERENCE, the reward model that a stage reads

PROBE = "Stages are trained one at a time; 1,234 tokens are 5% of 24,680. Straße, naïve, 東京, λ(x)\n\tdef f(x): ..."
"""Text that two tokenizers are compared on."""


class Teacher:
    """The model of `distillation.teacher`.

    Args:
        config: The run's configuration, its model settled.
        vocab_size: Ids that the student knows.
        mask_token: The id shown at masked positions.
        data: Id of the prepared data.

    Raises:
        NotFound: There is no model.
        UsageError: It is none that could teach this run.
    """

    def __init__(self, config: StackWiseConfig, vocab_size: int, mask_token: int, data: Hex) -> None:
        path, key = self.named(config)
        assert path is not None, "a run with a teacher"
        self._key = key
        self.settings, self._student = config.distillation, config
        with under(key):
            self.checkpoint = Checkpoint(expanded(path), config.data.cache_dir)
        about = self.checkpoint.description
        self.n_blocks, self.width, self.vocab_size = about.n_blocks, about.config.d_model, about.vocab_size
        self.shared_ids = min(vocab_size, about.vocab_size)
        self._check(mask_token)
        sizes = {"vocab_size": about.vocab_size, "max_seq_len": about.max_seq_len}
        model = ModelConfig.model_validate(about.config.model_dump() | sizes)
        # What the teacher computes is that of a run of its own over these rows.
        self.config = config.model_copy(update={"model": model, "distillation": DistillationConfig()})
        self.forward = forward_specification(self.config, about.vocab_size, mask_token, data)

    def named(self, config: StackWiseConfig) -> tuple[str | None, str]:
        """Where the teacher is, and the key that says so."""
        return config.distillation.teacher, "distillation.teacher"

    def _check(self, mask_token: int) -> None:
        config, about, where = self._student, self.checkpoint.description, self.checkpoint.directory
        if (length := config.training.seq_len // config.objective.sequences) > about.max_seq_len:
            raise UsageError(
                f"{self._key}: {where} takes at most {about.max_seq_len} tokens, and a sequence here has {length} "
                "(training.seq_len)"
            )
        if about.causal != config.objective.causal:
            raise UsageError(
                f"{self._key}: {where} attends {'causally' if about.causal else 'both ways'}, "
                f"and training.objective {config.objective.name} does not",
                hint="choose an objective of the teacher's direction: clm for a causal one",
            )
        if config.objective.masks and mask_token >= about.vocab_size:
            raise UsageError(f"{self._key}: {where} knows {about.vocab_size} ids, the mask is {mask_token}")
        if wrong := [depth for depth in self.settings.at or () if depth > self.n_blocks]:
            raise UsageError(f"distillation.at: {wrong[0]} is above the teacher's {self.n_blocks} blocks")

    def check(self, stages: Sequence[Stage], data: PreparedData) -> None:
        """Refuse stages that the teacher cannot draw to it, and data whose ids are not the teacher's.

        Raises:
            UsageError: A stage is drawn to tokens, and it has no head; to hidden states of another width, by a layer
                that does not train; or an id is not among its own.
        """
        where = self.checkpoint.directory
        if not self.checkpoint.names(HEAD) and any(map(self._is_whole, stages)):
            raise UsageError(
                f"{self._key}: {where} has no head, and a stage of all blocks is drawn to its tokens",
                hint="name a teacher with a head, or train in stages of some blocks",
            )
        for stage in stages:
            if (width := self.match(stage)) is not None and HEAD not in stage.trains:
                raise UsageError(
                    f"{self._key}: the hidden states of {where} have width {width}, those of the model "
                    f"{self._student.model.d_model}; the layer between them would be frozen with the head of stage "
                    f"{stage.depth}, where adapters train alone (training.adapters)",
                    hint="set distillation.match: none, or training.mode: end_to_end, drawn to the teacher's tokens",
                )
        self.check_ids(data)

    def check_ids(self, data: PreparedData) -> None:
        """Refuse data whose ids are not the teacher's.

        Raises:
            UsageError: They are of another tokenizer, or one is not among its own.
        """
        where = self.checkpoint.directory
        highest = max(
            len(split.counts.nonzero()[0]) and int(split.counts.nonzero()[0][-1])
            for split in (data.train, data.held_out)
        )
        if highest >= self.vocab_size:
            raise UsageError(f"{self._key}: {where} knows {self.vocab_size} ids, the data has id {highest}")
        theirs, ours = self.checkpoint.tokenizer_json, Path(data.directory) / TOKENIZER
        if theirs is not None and ours.exists():
            ids, other = (list(Tokenizer.load(path).encode_batch([PROBE])[0]) for path in (theirs, ours))
            if ids != other:
                raise UsageError(
                    f"{self._key}: {where} has another tokenizer than the data",
                    hint=f"prepare the data with the teacher's: data.tokenizer: {theirs}",
                )

    @property
    def top_k(self) -> int:
        """How many of its likeliest tokens are kept of a position."""
        return min(self.settings.top_k, self.shared_ids)

    def depth(self, stage: Stage) -> int:
        """How many of the teacher's blocks are below what a stage is drawn to."""
        if self.settings.at is not None and stage.depth < len(self.settings.at):
            return self.settings.at[stage.depth]
        return max(1, round((stage.last + 1) * self.n_blocks / self._student.model.n_blocks))

    def inputs(self, stage: Stage) -> dict[str, Hex]:
        """What a stage is drawn to: names of inputs, and the trunks of their boundaries."""
        if self._is_whole(stage):
            below = self.trunk(self.n_blocks)
            head = self.checkpoint.digest(HEAD)
            about = {"trunk": below, "head": head, "ids": self.shared_ids, "top_k": self.top_k}
            return {LOGITS: content_id("likeliest", about)}
        return {} if self.settings.match == "none" else {TEACHER: self.trunk(self.depth(stage))}

    def _is_whole(self, stage: Stage) -> bool:
        return stage.first == 0 and stage.last == self._student.model.n_blocks - 1

    def match(self, stage: Stage) -> int | None:
        """The width that a stage's hidden states are brought to; None: they have it, or are drawn to nothing."""
        other = TEACHER in self.inputs(stage) and self.width != self._student.model.d_model
        return self.width if other else None

    def trunk(self, depth: int) -> Hex:
        """The trunk whose boundary holds the hidden states that leave so many blocks."""
        parts = [FRONT, *map(block_part, range(depth))]
        return trunk_id(self.forward, [self.checkpoint.digest(part) for part in parts], {})


class Reference(Teacher):
    """The model that preferences are measured against: what it says of each answer is kept, once, by content.

    So it is never in memory beside the policy.
    """

    def __init__(self, config: StackWiseConfig, vocab_size: int, mask_token: int, data: Hex) -> None:
        super().__init__(config, vocab_size, mask_token, data)
        # What waits for the head is kept as it was computed: a rounded reference would not be the policy's start.
        store = self.config.store.model_copy(update={"codec": lossless_codec(self.config.precision)})
        self.config = self.config.model_copy(update={"store": store})
        self._data = data

    def named(self, config: StackWiseConfig) -> tuple[str | None, str]:
        """See `Teacher.named`: the objective's, else what the run begins from."""
        objective, init = config.objective, config.init
        if objective.reference:
            return objective.reference, "training.objective.reference_model"
        hint = "export what it is to be (stackwise export --format hf), and name that directory"
        if init.weights is None:
            raise UsageError(f"training.objective: {objective.name} needs init.weights or reference_model", hint=hint)
        if init.adapters or is_adapter(expanded(init.weights)) or (expanded(init.weights) / "run.json").exists():
            what = "adapters" if not (expanded(init.weights) / "run.json").exists() else "a run"
            raise UsageError(f"training.objective.reference_model: init.weights is {what}, name a model", hint=hint)
        if init.blocks is not None:
            raise UsageError("training.objective.reference_model: init.blocks takes some blocks, name a whole model")
        return init.weights, "init.weights"

    def inputs(self, stage: Stage) -> dict[str, Hex]:
        head = self.checkpoint.digest(HEAD)
        about = {"trunk": self.trunk(self.n_blocks), "head": head, "ids": self.vocab_size, "data": self._data}
        return {REFERENCE: content_id("reference log-probabilities", about)}

    def match(self, stage: Stage) -> int | None:
        """See `Teacher.match`: hidden states are drawn to nothing."""
        return None


class Judge(Reference):
    """The model that says how hard rows are (`training.curriculum.model`): its loss of each is kept, once, by content.

    Args:
        path: Its directory.
        others: As of `Teacher`.

    Raises:
        UsageError: It has no head, or see `Teacher`.
    """

    def __init__(self, path: str, config: StackWiseConfig, vocab_size: int, mask_token: int, data: Hex) -> None:
        self._path = path
        super().__init__(config.model_copy(update={"distillation": DistillationConfig()}), vocab_size, mask_token, data)
        if not self.checkpoint.names(HEAD):
            raise UsageError(f"{self._key}: {self.checkpoint.directory} has no head, so it has no loss")

    def named(self, config: StackWiseConfig) -> tuple[str | None, str]:
        key = "training.curriculum.model"
        if (expanded(self._path) / "run.json").exists():
            hint = f"export it (stackwise export --run {self._path} --format hf --out DIR), and name that directory"
            raise UsageError(f"{key}: {self._path} is a run, name a model", hint=hint)
        return self._path, key

    def inputs(self, stage: Stage) -> dict[str, Hex]:
        objective = self._student.objective
        about = {"trunk": self.trunk(self.n_blocks), "head": self.checkpoint.digest(HEAD), "data": self._data}
        return {DIFFICULTY: content_id("losses of rows", about | {"objective": objective.scoring() | objective.code})}


def judge_of(config: StackWiseConfig, stage: Stage, vocab_size: int, mask_token: int, data: Hex) -> Judge | None:
    """Whoever says how hard a stage's rows are; None: no model does.

    Raises:
        UsageError: See `Judge`.
    """
    curriculum = config.stage_training(stage.depth).curriculum
    if curriculum is None or curriculum.by != "model" or curriculum.model is None:
        return None
    return Judge(curriculum.model, config, vocab_size, mask_token, data)


def teacher_of(config: StackWiseConfig, vocab_size: int, mask_token: int, data: Hex) -> Teacher | None:
    """Whoever gives a run's stages numbers by row; None: nobody does.

    Raises:
        UsageError: See `Teacher`.
    """
    if config.objective.reference is not None:
        return Reference(config, vocab_size, mask_token, data)
    return None if config.distillation.teacher is None else Teacher(config, vocab_size, mask_token, data)


def reference_sources(stage: Stage, sources: Versions) -> dict[str, Source]:
    """The parts of the reference: what the run begins from."""
    return {part: sources.get(part, Source()) for part in stage.holds}


def rollout_inputs(stage: Stage, sources: Versions, scores: Hex | None) -> dict[str, Hex]:
    """What a stage's result follows from beside its rows and weights: names, and content ids.

    Args:
        scores: What `score_model` returns.
    """
    digests = {part: source.digest for part, source in reference_sources(stage, sources).items()}
    return {REFERENCE: content_id("reference", digests)} | ({} if scores is None else {SCORES: scores})


def score_model(config: StackWiseConfig, data: PreparedData) -> Hex | None:
    """The id of the reward model that says the scores; None: a function does, or nothing is scored.

    Raises:
        NotFound: There is no such run.
        UsageError: It is no reward model, is not finished, has another tokenizer, or takes less than a row; or the run
            begins from nothing.
    """
    if not config.objective.rolls_out:
        return None
    if config.init.weights is None:
        raise UsageError(
            f"training.objective: {config.objective.name} needs init.weights, which is its reference too",
            hint="fine-tune first (training.objective: sft), and name that run or its export",
        )
    kind: Score = getattr(config.objective, "score")  # noqa: B009  # an objective that rolls out has one
    if kind.run is None:
        return None
    key, run = "training.objective.score", RunDirectory(expanded(kind.run))
    with under(key):
        theirs, manifest = run.config(), run.manifest()
    if theirs.objective.name != "reward":
        raise UsageError(
            f"{key}: {run.path} was trained with {theirs.objective.name}, and gives no scores",
            hint="name a run with training.objective: reward",
        )
    stages = manifest["stages"]
    if not stages or any(stage["state"] != "done" for stage in stages):
        done = sum(stage["state"] == "done" for stage in stages)
        raise UsageError(
            f"{key}: {done} of {len(stages)} stages of {run.path} are committed",
            hint=f"stackwise run --run {run.path} finishes it",
        )
    if PreparedData.open(Path(manifest["data"]["directory"])).tokenizer_id != data.tokenizer_id:
        raise UsageError(
            f"{key}: {run.path} has another tokenizer than this run",
            hint="train the reward model from the same weights as the policy, or with the same data.tokenizer",
        )
    longest = theirs.model.max_seq_len or theirs.training.seq_len
    if longest < config.training.seq_len:
        raise UsageError(
            f"{key}: {run.path} takes at most {longest} tokens, and a row here has {config.training.seq_len}",
            hint=f"set training.seq_len to {longest} or less, or train it on longer rows",
        )
    return content_id("reward model", [stage["recipe"] for stage in stages])


def rollout_trunk(forward: Mapping[str, Any], objective: Mapping[str, Any], policy: Mapping[str, Hex | None]) -> Hex:
    """What answers of a policy are known by, beside their rows.

    Args:
        forward: The forward specification of the run.
        objective: How they are drawn, and the seed.
        policy: The digest of each of its parts.
    """
    return content_id("rollout", {"forward": dict(forward), "drawn": dict(objective), "policy": dict(policy)})
