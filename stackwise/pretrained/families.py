"""Families of pretrained models: config.json and names of tensors, as each writes them. No torch here.

A family is one class that knows one `model_type`. What a config.json asks for and StackWise cannot do exactly is
refused by name and value, never approximated: a key that no family knows is refused, too.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import ValidationError

from stackwise.config.model import ModelConfig
from stackwise.config.translations import read_model
from stackwise.errors import UsageError
from stackwise.model.kinds import TransformHead
from stackwise.pretrained.keys import FORMAT, SPECIAL, Keys, check_format
from stackwise.registry import PLUGINS, Registry
from stackwise.text import printable
from stackwise.version import __version__

FRONT, HEAD, BLOCK = "front", "head", "block."
"""Names of parts, as a schedule has them; of a block, its index follows."""

FAMILIES: Registry[type[Family]] = Registry(
    "architecture",
    f"{__name__}:Family",
    "stackwise.pretrained.builtin",
    {
        "llama": "Llama",
        "mistral": "Mistral",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "mixtral": "stackwise.pretrained.mixtures:Mixtral",
        "qwen2_moe": "stackwise.pretrained.mixtures:Qwen2Moe",
        "qwen3_moe": "stackwise.pretrained.mixtures:Qwen3Moe",
        "gpt2": "GPT2",
        "bert": "stackwise.pretrained.bert:Bert",
        "roberta": "stackwise.pretrained.bert:Roberta",
        "modernbert": "stackwise.pretrained.bert:ModernBert",
        "stackwise": "StackWise",
    },
)
"""Families by `model_type`."""


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor of a part is in a checkpoint, as plain data.

    Args:
        file: The file's name in the checkpoint's directory.
        name: What the file calls the tensor.
        transpose: Ours is the transpose of the file's.
        rows: Ours is these rows of it (after the transpose): from, to.
    """

    file: str
    name: str
    transpose: bool = False
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of itself, in settings of StackWise; plain data.

    Args:
        model: Settings of `model.*`; those that it leaves out are at their defaults.
        vocab_size: Rows of the embedding.
        max_seq_len: The longest sample that it takes.
        causal: Whether it attends causally.
        masked_head: Whether its head predicts masked tokens.
        special_ids: Ids of bos, eos, pad and mask, as config.json has them (several: the first).
        notes: What is to be said of it, one line each.
    """

    model: dict[str, Any]
    vocab_size: int
    max_seq_len: int
    causal: bool = True
    masked_head: bool = False
    special_ids: dict[str, int | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def config(self) -> ModelConfig:
        """The settings, checked."""
        return read_model(self.model)

    @property
    def n_blocks(self) -> int:
        """Blocks of the rack."""
        return self.config.n_blocks

    def untied(self) -> Description:
        """The same with a head of its own."""
        return dataclasses.replace(self, model=self.model | {"tie_embeddings": False})

    @property
    def parts(self) -> list[str]:
        """The names of all parts, lowest first."""
        return [FRONT, *(f"{BLOCK}{index}" for index in range(self.n_blocks)), HEAD]


class Family(abc.ABC):
    """One `model_type`: what its config.json says, and what its files call the tensors of each part.

    Names map a tensor of a part, without its last word (`weight`, `bias`), to the file's.
    """

    model_type: ClassVar[str]
    native: ClassVar[bool] = False
    """Whether it takes every rack, under the names of its own parts."""
    architecture: ClassVar[str]
    """What `architectures` says of an export."""
    base: ClassVar[str] = "model."
    """What the names of all but the head's tensors begin with; a file of the bare model leaves it out."""
    block: ClassVar[str] = "layers.{}."
    """What the names of a block's tensors begin with, behind `base`."""
    front_names: ClassVar[Mapping[str, str]] = {"embedding": "embed_tokens"}
    block_names: ClassVar[Mapping[str, str]]
    head_names: ClassVar[Mapping[str, str]] = {"norm": "norm"}
    """Of what belongs to the bare model."""
    task_names: ClassVar[Mapping[str, str]] = {"projection": "lm_head.weight"}
    """Of what does not: whole names."""
    ignored: ClassVar[Sequence[str]] = (r".*rotary_emb\.inv_freq",)
    """Patterns of tensors in files that follow from the configuration, or are tied to others."""
    unused: ClassVar[Sequence[str]] = ()
    """Patterns of tensors that no part uses, such as a pooler; a run says that they are left out."""

    @abc.abstractmethod
    def read(self, config: Mapping[str, Any]) -> Description:
        """What a config.json says.

        Raises:
            UsageError: It asks for what cannot be done exactly, or for what cannot be.
        """

    @abc.abstractmethod
    def write(self, model: ModelConfig, description: Description) -> dict[str, Any] | None:
        """The config.json of a rack; None where it is not of the family.

        Whoever calls reads it back and compares, so that only what has a key of another name is looked at here.

        Args:
            model: The rack's configuration.
            description: Its other facts.
        """

    def refs(self, description: Description, part: str, base: str, stored: Iterable[str] = ()) -> dict[str, TensorRef]:
        """Where the tensors of a part are; the file is still empty.

        Args:
            description: What config.json says.
            part: The part.
            base: What names in files begin with.
            stored: Names that the files have.
        """
        refs: dict[str, TensorRef] = {}
        for name in part_shapes(description, part):
            stem, _, kind = name.rpartition(".")
            if part == HEAD and (name in self.task_names or stem in self.task_names):
                refs[name] = TensorRef("", self.task_names.get(name) or f"{self.task_names[stem]}.{kind}")
            elif part in (FRONT, HEAD):
                names = self.front_names if part == FRONT else self.head_names
                refs[name] = TensorRef("", f"{base}{names[stem]}.{kind}")
            else:
                prefix = base + self.block.format(part.removeprefix(BLOCK))
                refs[name] = TensorRef("", f"{prefix}{self.block_name(stem)}.{kind}")
        return refs

    def block_name(self, stem: str) -> str:
        """What files call a tensor of a block, without its last word, behind `block`."""
        return self.block_names[stem]

    def own_names(self, part: str, names: Iterable[str]) -> list[str]:
        """What files call tensors of a part that `part_shapes` may not know; those of the native family alone."""
        return []

    def copies(self, description: Description) -> dict[str, str]:
        """Tensors that an export writes under a second name as well, which no part reads: name, and the second."""
        return {}

    def tied(self, description: Description) -> list[str]:
        """Patterns of tensors that files may hold once more: a head that is tied to the embedding."""
        return [re.escape(self.task_names["projection"])] if description.config.tie_embeddings else []


def read_description(family: Family, config: Mapping[str, Any]) -> Description:
    """What a config.json says, its settings checked.

    Raises:
        UsageError: It says what cannot be done exactly, or what cannot be.
    """
    description = family.read(config)
    entry = config.get("stackwise")
    if isinstance(entry, dict) and not family.native:
        check_format(entry)
        tokens = {"mask_token_id": Keys(entry).token("mask_token_id")}
        description = dataclasses.replace(description, special_ids={**description.special_ids, **tokens})
    try:
        description.config  # noqa: B018 - the settings are checked here, once
    except ValidationError as error:
        fault = error.errors()[0]
        where, why = ".".join(map(str, fault["loc"])), printable(fault["msg"])
        kind = fault["type"] == "kind"
        hint = f"name the file that registers it in the environment: {PLUGINS}=FILE.py" if kind else None
        what = f"it has layers of a kind that is not here: {why}" if kind else f"{printable(where)}: {why}"
        raise UsageError(what, hint=hint) from None
    return description


def family_of(description: Description, prefer: str | None = None) -> Family:
    """The family that a rack is of: the first whose config.json reads back as the same rack.

    Args:
        description: The rack.
        prefer: The family to try first; "stackwise" takes every rack.
    """
    for name in dict.fromkeys((*([prefer] if prefer else []), *FAMILIES.names())):
        family = FAMILIES[name]()
        if family.native or _describes(family, description):
            return family
    raise AssertionError("every rack is of the native family")


def _describes(family: Family, description: Description) -> bool:
    if family.write(description.config, description) is None:
        return False
    try:
        back = read_description(family, config_json(family, description))
    except UsageError:
        return False
    # Where the longest sample was not said, what was trained says it.
    model = description.config.model_copy(update={"max_seq_len": description.max_seq_len})
    facts = [
        (about.vocab_size, about.max_seq_len, about.causal, settings.tie_embeddings, settings.n_blocks)
        for about, settings in ((back, back.config), (description, model))
    ]
    return facts[0] == facts[1] and back.config.specification() == model.specification()


def config_json(family: Family, description: Description) -> dict[str, Any]:
    """The config.json of a rack that is of the family."""
    config, ids = family.write(description.config, description), description.special_ids
    assert config is not None
    entry = {"format": FORMAT, "version": __version__, **config.pop("stackwise", {})}
    entry |= {"mask_token_id": ids.get("mask_token_id"), "separator_id": ids.get("eos_token_id")}
    entry |= {"causal": description.causal, "bidirectional": not description.causal}
    about = {"architectures": [family.architecture], "model_type": family.model_type}
    special = {key: ids.get(key) for key in SPECIAL if key != "mask_token_id"}
    return {**about, "vocab_size": description.vocab_size, **special, **config, "stackwise": entry}


def part_shapes(description: Description, part: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a part, as its module names them, and their shapes; those of kinds from outside may have more.

    A tied projection is the front's.
    """
    model = description.config
    width, vocabulary = model.d_model, description.vocab_size
    if part == FRONT:
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (vocabulary, width)}
        if model.positions == "learned":
            shapes["positions.weight"] = (description.max_seq_len + model.position_offset, width)
        if model.token_types:
            shapes["types.weight"] = (model.token_types, width)
        return shapes | (_norm(model, "norm") if model.embedding_norm else {})
    if part == HEAD:
        shapes = {} if model.tie_embeddings else {"projection": (vocabulary, width)}
        if isinstance(model.head, TransformHead):
            shapes |= {"dense.weight": (width, width)} | ({"dense.bias": (width,)} if model.head.layer_bias else {})
            shapes |= {"bias": (vocabulary,)} if model.head.bias else {}
            shapes |= _norm(model, "input_norm") if model.head.input_norm else {}
        return shapes | (_norm(model, "norm") if getattr(model.head, "norm", True) else {})
    model = model.at(int(part.removeprefix(BLOCK)))
    shapes = (_norm(model, "attention_norm") if model.first_norm else {}) | _norm(model, "ffn_norm")
    for place, kind in (("attention", model.attention), ("ffn", model.ffn)):
        for name, matrix in kind.matrices(model).items():
            shapes[f"{place}.{name}.weight"] = (matrix.outputs, matrix.inputs)
            if matrix.bias:
                shapes[f"{place}.{name}.bias"] = (matrix.outputs,)
    if getattr(model.attention, "qk_norm", False):
        shapes |= {f"attention.{name}.weight": (model.head_dim,) for name in ("q_norm", "k_norm")}
    return shapes


def stored_shape(shape: tuple[int, ...], refs: Iterable[TensorRef], ref: TensorRef) -> tuple[int, ...]:
    """The shape of the tensor in a file that holds a part's tensor.

    Args:
        shape: Of the part's tensor.
        refs: Those of the whole part.
        ref: Where that tensor is.
    """
    if ref.rows is not None:
        shape = (max(other.rows[1] for other in refs if other.name == ref.name and other.rows), *shape[1:])
    return shape[::-1] if ref.transpose else shape


def _norm(model: ModelConfig, name: str) -> dict[str, tuple[int, ...]]:
    names = ("weight", "bias") if model.norm == "layernorm" and model.norm_bias else ("weight",)
    return {f"{name}.{kind}": (model.d_model,) for kind in names}


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether a tensor's name in a file is one of some patterns."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)
