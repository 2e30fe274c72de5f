"""The mixture of experts as a kind of feed-forward: its settings and facts. Its module is in `experts.py`.

No torch here but where the kind builds something.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PrivateAttr
from pydantic_core import PydanticCustomError

from stackwise.config.fields import NonNegative, Positive, Section, Size, Small
from stackwise.config.kinds import Fault, FeedForward, Matrix
from stackwise.model.kinds import SwiGLU

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stackwise.config.model import ModelConfig
    from stackwise.config.schema import Settings


class Annealing(Section):
    """A temperature that goes in a line from `start` to `end`, and stays there."""

    start: Positive = Field(description="at the first step")
    end: Positive = Field(description="after `epochs`, and wherever nothing trains")
    epochs: Positive = Field(description="passes over the stage's rows that it takes")

    def after(self, passes: float | None) -> float:
        """The temperature after so many passes over the rows; None: nothing trains."""
        done = 1.0 if passes is None else min(1.0, passes / self.epochs)
        return self.start + (self.end - self.start) * done


def _temperature(value: Any) -> Any:
    if isinstance(value, dict | Annealing):
        return Annealing.model_validate(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise PydanticCustomError("temperature", "must be a number above 0, or a mapping with start, end and epochs")
    return float(value)


def _cut(name: str, dense: Mapping[str, Any], columns: slice, weight: float) -> dict[str, Tensor]:
    """Some of a gated feed-forward's inner width as one of its own, what it gives times `weight`."""
    state = {f"{name}.{side}.weight": dense[f"{side}.weight"][columns] for side in ("gate", "up")}
    return state | {f"{name}.down.weight": dense["down.weight"][:, columns] * weight}


class MoE(FeedForward):
    """A mixture of experts (arXiv 1701.06538; Switch, 2101.03961): each token goes to the best of many feed-forwards.

    Experts are gated feed-forwards without biases. Blocks that `at` leaves out have a dense one.
    """

    residual: ClassVar[tuple[str, ...]] = ("experts.*.down.weight", "shared.down.weight")
    divides: ClassVar[bool] = False
    upcycles: ClassVar[bool] = True

    experts: Small = Field(description="experts in a block")
    top_k: Small = Field(1, description="experts that a token goes to")
    expert_dim: Size | None = Field(None, description="width inside an expert; null: that of a dense feed-forward")
    capacity_factor: Positive | None = Field(
        None,
        description="tokens that an expert takes in training, as a multiple of its even share of a microbatch; what "
        "is beyond goes past it. null: all (dropless). What is stored or evaluated drops nothing in any case",
    )
    balance: Literal["loss", "bias", "none"] = Field(
        "loss",
        description="what keeps experts in use: an auxiliary loss (arXiv 2101.03961), a bias on the choice that moves "
        "once a step and has no gradient (arXiv 2408.15664), or nothing",
    )
    aux_weight: NonNegative = Field(0.01, description="balance loss: its weight")
    balance_rate: Positive = Field(0.001, description="balance bias: how far it moves in a step")
    router_z: NonNegative = Field(0.0, description="weight of the router's z-loss (arXiv 2202.08906); 0: none")
    shared_experts: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="experts that every token goes to beside its own (arXiv 2401.06066)"
    )
    shared_dim: Size | None = Field(
        None, description="width inside all shared experts together; null: expert_dim for each of them"
    )
    shared_gate: bool = Field(False, description="a sigmoid of each token weighs what the shared experts give (Qwen 2)")
    at: list[Annotated[int, Field(ge=0, lt=1024)]] | None = Field(
        None, description="the blocks that have experts, 0 the lowest; null: all"
    )
    noise: NonNegative = Field(
        0.0, description="standard deviation of what is added to the router's logits in training"
    )
    temperature: Annotated[float | Annealing, BeforeValidator(_temperature)] = Field(
        1.0,
        description="the router's logits are divided by it: a number, or {start, end, epochs}, in a line over so many "
        "passes",
    )
    normalize: bool | None = Field(
        None, description="a token's weights add up to 1; null: where top_k is above 1, as else the router learns none"
    )

    _place: int | None = PrivateAttr(None)

    @property
    def place(self) -> int | None:
        """The block that it is resolved for."""
        return self._place

    @property
    def normalizes(self) -> bool:
        """`normalize`, resolved."""
        return self.top_k > 1 if self.normalize is None else self.normalize

    @property
    def last_temperature(self) -> float:
        """The temperature where nothing trains."""
        return self.temperature.end if isinstance(self.temperature, Annealing) else self.temperature

    def in_block(self, block: int) -> FeedForward:
        """See `FeedForward.in_block`: a dense feed-forward where there are no experts."""
        if self.at is not None and block not in self.at:
            return SwiGLU.model_validate({})
        resolved = self.model_copy(update={"at": None})
        resolved._place = block
        return resolved

    def chosen(self, blocks: Sequence[int]) -> FeedForward:
        if self.at is None:
            return self
        places = [place for place, block in enumerate(blocks) if block in self.at]
        return self.model_copy(update={"at": places}) if places else SwiGLU.model_validate({})

    def width(self, d_model: int) -> int:
        """As that of a dense one; without dense blocks that of an expert."""
        if self.at is None and self.expert_dim is not None:
            return self.expert_dim
        return SwiGLU.model_validate({}).width(d_model)

    def expert_width(self, model: ModelConfig) -> int:
        """Width inside an expert."""
        return self.expert_dim or model.ffn_width

    def shared_width(self, model: ModelConfig) -> int:
        """Width inside all shared experts together."""
        return (self.shared_dim or self.shared_experts * self.expert_width(model)) if self.shared_experts else 0

    def matrices(self, model: ModelConfig) -> dict[str, Matrix]:
        """See `BlockPart.matrices`; the router stays wide, as it chooses."""
        d = model.d_model

        def gated(name: str, width: int) -> dict[str, Matrix]:
            sides = {"gate": (width, d), "up": (width, d), "down": (d, width)}
            return {f"{name}.{key}": Matrix(*side) for key, side in sides.items()}

        layers = {"router": Matrix(self.experts, d, narrow=False)}
        for number in range(self.experts):
            layers |= gated(f"experts.{number}", self.expert_width(model))
        if self.shared_experts:
            layers |= gated("shared", self.shared_width(model))
            layers |= {"shared_gate": Matrix(1, d, narrow=False)} if self.shared_gate else {}
        return layers

    def other_parameters(self, model: ModelConfig) -> int:
        """The bias on the choice."""
        return self.experts if self.balance == "bias" else 0

    def active_parameters(self, model: ModelConfig) -> int:
        idle = (self.experts - min(self.top_k, self.experts)) * 3 * model.d_model * self.expert_width(model)
        return self.parameters(model) - idle

    def pieces(self, model: ModelConfig) -> tuple[str, ...]:
        return tuple(f"experts.{number}" for number in range(self.experts))

    def kept(self, model: ModelConfig) -> int:
        """Of each expert of a token its input, what leaves both layers, the SiLU, the product, and what it gives.

        Of the router its logits and their softmax; of shared experts what a dense feed-forward keeps.
        """
        expert = self.top_k * (2 * model.d_model + 4 * self.expert_width(model))
        return expert + 3 * self.experts + 4 * self.shared_width(model) + (model.d_model if self.shared_gate else 0)

    def specification(self, model: ModelConfig) -> dict[str, Any]:
        """What shapes a forward pass that trains nothing; what shapes training alone is in `training_specification`."""
        spec: dict[str, Any] = {"kind": self.name, "experts": self.experts, "top_k": self.top_k}
        spec |= {"expert_dim": self.expert_width(model), "normalize": self.normalizes}
        if self.shared_experts:
            spec |= {"shared": self.shared_width(model), "shared_gate": self.shared_gate}
        if self.last_temperature != 1.0:
            spec["temperature"] = self.last_temperature
        spec |= {"bias": True} if self.balance == "bias" else {}
        every = self.at is None or set(self.at) >= set(range(model.n_blocks))
        return spec if every else spec | {"at": sorted(set(self.at or ()))}

    def training_specification(self, model: ModelConfig) -> dict[str, Any]:
        used = {"loss": {"aux_weight"}, "bias": {"balance_rate"}, "none": set[str]()}[self.balance]
        return self.model_dump(include={"capacity_factor", "balance", "router_z", "noise", "temperature"} | used)

    def faults(self, model: ModelConfig) -> Iterator[Fault]:
        if self.top_k > self.experts:
            yield "top_k", f"{self.top_k} is more than the {self.experts} experts: take at most {self.experts}"
        beyond = [block for block in self.at or () if block >= model.n_blocks]
        if beyond and model.architecture.n_stacks is not None:
            yield "at", f"there is no block {beyond[0]}: the rack has 0 to {model.n_blocks - 1}"
        twice = next((block for block in self.at or () if (self.at or []).count(block) > 1), None)
        if twice is not None:
            yield "at", f"block {twice} is named twice: name each block once"
        if self.at == []:
            yield "at", "no block has experts: name some, or take another model.ffn"
        for key in ("shared_dim", "shared_gate"):
            if getattr(self, key) and not self.shared_experts:
                yield key, "there are no shared experts: set model.ffn.shared_experts too"

    def faults_in(self, config: Settings) -> Iterator[Fault]:
        if self.balance == "bias" and config.training.adapters is not None:
            yield "balance", "bias: under training.adapters the router is frozen, and nothing moves it: take none"
        for depth in range(config.n_stages if self.capacity_factor is not None else 0):
            rows = config.stage_training(depth).batch_size
            tokens = rows * config.row_positions
            if rows and self.capacity(tokens) < 1:
                share = f"{self.capacity_factor:g} of an even share of {tokens} tokens over {self.experts} experts"
                yield "capacity_factor", f"{share} is less than one token: raise it, or set null (dropless)"
                return

    def upcycling_faults(self, model: ModelConfig, dense: ModelConfig, models: int) -> Iterator[str]:
        """See `FeedForward.upcycling_faults`: a dense one is cut into its shared width and that of an expert."""
        theirs, width = dense.ffn.matrices(dense), self.shared_width(model) + self.expert_width(model)
        if {*theirs} != {"gate", "up", "down"} or any(matrix.bias for matrix in theirs.values()):
            yield f"experts are gated and have no biases, unlike the feed-forwards of init.weights ({dense.ffn.name})"
        elif theirs["down"].inputs != width:
            there = f"the feed-forwards of init.weights are {theirs['down'].inputs} wide"
            yield f"expert_dim and shared experts make {width}, and {there}: they have to be the same"
        if models > self.experts:
            yield f"{models} models for {self.experts} experts: name at most {self.experts}"

    def upcycled(self, model: ModelConfig, dense: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """See `FeedForward.upcycled`: expert i begins as the model i, and again from the first one.

        A shared expert takes the first columns of their mean. What the router would weaken at first, where a token's
        weights add up to less than 1, is made up for (arXiv 2410.07524): the whole begins close to the
        dense model.
        """
        shared, width = self.shared_width(model), self.expert_width(model)
        weight = 1.0 if self.normalizes else self.experts / self.top_k
        state: dict[str, Tensor] = {}
        for number in range(self.experts):
            state |= _cut(f"experts.{number}", dense[number % len(dense)], slice(shared, shared + width), weight)
        if shared:
            mean = {name: sum((one[name] for one in dense[1:]), dense[0][name]) / len(dense) for name in dense[0]}
            state |= _cut("shared", mean, slice(shared), 2.0 if self.shared_gate else 1.0)  # its gate opens half
        return state

    def unused(self) -> Iterator[tuple[str, str | bool]]:
        for name, of in (("aux_weight", "loss"), ("balance_rate", "bias")):
            yield name, self.balance != of and f"model.ffn.balance is {self.balance}"

    def capacity(self, tokens: int) -> int:
        """Tokens that an expert takes of a microbatch of so many, where there is a limit."""
        return int((self.capacity_factor or 0.0) * tokens * self.top_k / self.experts)

    def build(self, model: ModelConfig) -> nn.Module:
        from stackwise.model.experts import MixtureFeedForward

        return MixtureFeedForward(model, self)
