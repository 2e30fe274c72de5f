"""Families of pretrained models: config.json and names of tensors, as each writes them. No torch here.

A family is one class that knows one `model_type`. What a config.json asks for and StackWise cannot do exactly is
refused by name and value, never approximated: a key that no family knows is refused, too.
"""

from __future__ import annotations

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
from stackwise.registry import PLUGINS, Registry
from stackwise.text import printable
from stackwise.version import __version__

FORMAT = 1
"""Version of the `stackwise` entry in config.json."""

FRONT, HEAD, BLOCK = "front", "head", "block."
"""Names of parts, as a schedule has them; of a block, its index follows."""

LARGEST = 1 << 24
"""The largest size that an axis of a tensor may have, as in the configuration."""

FAMILIES: Registry[type[Family]] = Registry(
    "architecture", "", "stackwise.pretrained.families", {"llama": "Llama", "stackwise": "StackWise"}
)
"""Families by `model_type`."""

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")


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

    @property
    def parts(self) -> list[str]:
        """The names of all parts, lowest first."""
        return [FRONT, *(f"{BLOCK}{index}" for index in range(self.n_blocks)), HEAD]


class Keys:
    """The keys of one config.json, each asked for by name and type; those that nobody asked for are refused at last.

    Args:
        config: The content of config.json.

    Raises (every method):
        UsageError: A value that cannot be, or that asks for what StackWise cannot do exactly.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config, self._asked = config, set(BOOKKEEPING)

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is; null counts as left out."""
        self._asked.add(key)
        value = self._config.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None) -> int:
        """A length of an axis, or a number of things."""
        value = self.get(key, default)
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise self.refusal(key, value, f"a whole number from 1 to {LARGEST}")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number above zero."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e15:
            raise self.refusal(key, value, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, value, "true or false")
        return value

    def token(self, key: str) -> int | None:
        """The id of a token; of several the first."""
        value = self.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if value is None or (type(value) is int and value < 0):  # some write -1 for none
            return None
        if type(value) is not int or value > LARGEST:
            raise self.refusal(key, value, "the id of a token")
        return value

    def choice(self, key: str, default: str, choices: Mapping[str, str]) -> str:
        """What one of some words stands for."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self.refusal(key, value, " or ".join(choices))
        return choices[value]

    def only(self, key: str, *values: Any) -> None:
        """Refuse a key with another value than these; left out, it has the first."""
        value = self.get(key, values[0])
        if not any(value == allowed and type(value) is type(allowed) for allowed in values):
            raise self.refusal(key, value, " or ".join(_json(allowed) for allowed in values))

    def ignore(self, *keys: str) -> None:
        """Keys whose value has no effect on what the model computes."""
        self._asked.update(keys)

    def finish(self) -> None:
        """Refuse what nobody asked for: it might change what the model computes."""
        for key, value in self._config.items():
            if key not in self._asked and value not in (None, False, [], {}):
                raise UsageError(
                    f"{printable(key)} is {_json(value)}, a setting of this architecture that StackWise does not know",
                    hint="if it does not change what the model computes, remove it from config.json",
                )

    @staticmethod
    def refusal(key: str, value: Any, allowed: str) -> UsageError:
        """The error for a value that is not done."""
        there = "is missing" if value is None else f"is {_json(value)}"
        return UsageError(f"{key} {there}; StackWise reads {allowed}", hint="a model that asks for more is not exact")


def _json(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    shown = words[value] if value is None or isinstance(value, bool) else f"{value!r}"
    return printable(shown if len(shown) <= 60 else shown[:57] + "...")


_WORDS = """
architectures model_type dtype torch_dtype transformers_version _name_or_path name_or_path use_cache auto_map id2label
label2id problem_type finetuning_task task_specific_params output_attentions output_hidden_states return_dict
torchscript gradient_checkpointing initializer_range _attn_implementation attn_implementation use_bfloat16
_attn_implementation_autoset language license unsloth_version unsloth_fixed stackwise tokenizer_class prefix vocab_size
bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id max_length
min_length do_sample early_stopping num_beams num_beam_groups temperature top_k top_p typical_p repetition_penalty
length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
exponential_decay_length_penalty begin_suppress_tokens diversity_penalty chunk_size_feed_forward
"""
BOOKKEEPING = frozenset(_WORDS.split())
"""Keys of every architecture that do not change what a model computes, or are read elsewhere."""


class Family:
    """One `model_type`: what its config.json says, and what its files call the tensors of each part.

    Names map a tensor of a part, without its last word (`weight`, `bias`), to the file's.
    """

    model_type: ClassVar[str]
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

    def read(self, config: Mapping[str, Any]) -> Description:
        """What a config.json says.

        Raises:
            UsageError: It asks for what cannot be done exactly, or for what cannot be.
        """
        raise NotImplementedError

    def write(self, model: ModelConfig, description: Description) -> dict[str, Any] | None:
        """The config.json of a rack; None where it is not of the family.

        Whoever calls reads it back and compares, so that only what has a key of another name is looked at here.

        Args:
            model: The rack's configuration.
            description: Its other facts.
        """
        raise NotImplementedError

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
                refs[name] = TensorRef("", f"{prefix}{self.block_names[stem]}.{kind}")
        return refs

    def stored_shape(self, description: Description, part: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor in a file that holds a part's tensor."""
        return shape

    def tied(self, description: Description) -> list[str]:
        """Patterns of tensors that files may hold once more: a head that is tied to the embedding."""
        return [re.escape(self.task_names["projection"])] if description.config.tie_embeddings else []


class Rotary(Family):
    """What LLaMA and its kin share: RMSNorm, rotary positions, SwiGLU."""

    block_names: ClassVar[Mapping[str, str]] = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        **{f"attention.{name}": f"self_attn.{name}_proj" for name in "qkvo"},
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        **{f"ffn.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    }
    positions: ClassVar[int] = 2048
    """`max_position_embeddings` where it is left out."""

    def attention(self, keys: Keys, blocks: int) -> dict[str, Any]:
        """Settings of the attention beside its heads."""
        return {}

    def head_size(self, keys: Keys, width: int, heads: int) -> int:
        """Width of a head of attention."""
        return keys.size("head_dim", max(1, width // heads))

    def read(self, config: Mapping[str, Any]) -> Description:
        """See `Family.read`."""
        keys = Keys(config)
        width, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
        blocks, seq_len = keys.size("num_hidden_layers"), keys.size("max_position_embeddings", self.positions)
        kv_heads, head = keys.size("num_key_value_heads", heads), self.head_size(keys, width, heads)
        keys.choice("hidden_act", "silu", {"silu": "silu", "swish": "silu"})
        keys.ignore("attention_dropout")
        attention = {"kind": "mha"} if kv_heads == heads else {"kind": "gqa", "kv_heads": kv_heads}
        model: dict[str, Any] = {
            "d_model": width,
            "n_heads": heads,
            "d_ff": keys.size("intermediate_size"),
            "architecture": {"n_stacks": blocks, "blocks_per_stack": 1},
            "attention": attention | self.attention(keys, blocks),
            "norm_eps": keys.number("rms_norm_eps", 1e-6),
            "tie_embeddings": keys.flag("tie_word_embeddings", False),
            "max_seq_len": seq_len,
        }
        model |= rope_settings(keys, seq_len) | self.biases(keys)
        if head * heads != width:
            model["head_size"] = head
        causal = keys.flag("is_causal", True)
        keys.finish()
        return Description(model, keys.size("vocab_size"), seq_len, causal, special_ids=special_ids(keys))

    def biases(self, keys: Keys) -> dict[str, Any]:
        """Settings of the biases of the linear layers."""
        return {}

    def write(self, model: ModelConfig, description: Description) -> dict[str, Any] | None:
        """See `Family.write`."""
        if model.norm != "rmsnorm" or model.positions != "rope":
            return None
        return {
            "hidden_size": model.d_model,
            "intermediate_size": model.ffn_width,
            "num_hidden_layers": model.n_blocks,
            "num_attention_heads": model.n_heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": description.max_seq_len,
            "rms_norm_eps": model.norm_eps,
            "initializer_range": model.init_std,
            **rope_keys(model),
            "attention_dropout": 0.0,
            "tie_word_embeddings": model.tie_embeddings,
            "is_causal": description.causal,
            "use_cache": description.causal,
        }


class Llama(Rotary):
    """LLaMA 1 to 3 (arXiv 2302.13971, 2407.21783)."""

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"

    def biases(self, keys: Keys) -> dict[str, Any]:
        """See `Rotary.biases`."""
        keys.ignore("pretraining_tp")  # how the product is cut, not what it is
        attention, ffn = keys.flag("attention_bias", False), keys.flag("mlp_bias", False)
        return {"bias": attention} if attention == ffn else {"bias": attention, "ffn": {"kind": "swiglu", "bias": ffn}}

    def write(self, model: ModelConfig, description: Description) -> dict[str, Any] | None:
        """See `Family.write`."""
        config = super().write(model, description)
        ffn = getattr(model.ffn, "bias", None)
        biases = {"attention_bias": model.bias, "mlp_bias": model.bias if ffn is None else ffn}
        return None if config is None else config | biases


class StackWise(Family):
    """A rack that no other family describes, under the names of its own parts."""

    model_type: ClassVar[str] = "stackwise"
    architecture: ClassVar[str] = "StackWise"

    def read(self, config: Mapping[str, Any]) -> Description:
        """See `Family.read`."""
        entry = config.get("stackwise")
        if not isinstance(entry, dict):
            raise UsageError("it has no stackwise entry", hint="export it again")
        keys = Keys(entry)
        check_format(entry)
        settings = keys.get("model")
        if not isinstance(settings, dict):
            raise keys.refusal("model", settings, "the settings of a rack")
        return Description(
            settings,
            keys.size("vocab_size"),
            keys.size("seq_len"),
            keys.flag("causal", False),
            special_ids={"mask_token_id": keys.token("mask_token_id"), "eos_token_id": keys.token("separator_id")},
        )

    def write(self, model: ModelConfig, description: Description) -> dict[str, Any] | None:
        """See `Family.write`; every rack is of it."""
        return {
            "stackwise": {
                "model": model.model_dump(mode="json"),
                "vocab_size": description.vocab_size,
                "seq_len": description.max_seq_len,
                "causal": description.causal,
                "bidirectional": not description.causal,
            }
        }

    def refs(self, description: Description, part: str, base: str, stored: Iterable[str] = ()) -> dict[str, TensorRef]:
        """See `Family.refs`: kinds from outside have tensors of which the files alone know."""
        place = f"{part.replace(BLOCK, 'blocks.')}."
        names = dict.fromkeys([f"{place}{name}" for name in part_shapes(description, part)])
        names |= dict.fromkeys(name for name in stored if name.startswith(place))
        if part == HEAD and description.config.tie_embeddings:
            names.pop("head.projection", None)
        return {name.removeprefix(place): TensorRef("", name) for name in names}

    def tied(self, description: Description) -> list[str]:
        """See `Family.tied`."""
        return []


def check_format(entry: Mapping[str, Any]) -> None:
    """Refuse the entry of a newer version.

    Raises:
        UsageError: It is one, or says no version.
    """
    written = entry.get("format")
    if type(written) is not int:
        raise UsageError(f"the stackwise entry is of format {_json(written)}", hint="export it again")
    if written > FORMAT:
        raise UsageError(
            f"it is of format {written}; this version reads up to {FORMAT}",
            hint="install a newer version of stackwise",
        )


def special_ids(keys: Keys) -> dict[str, int | None]:
    """The ids of special tokens that a config.json names."""
    return {name: token for name in SPECIAL if (token := keys.token(name)) is not None}


ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
"""For each kind of rope scaling, the keys that it must have and those that it may have."""


def rope_settings(keys: Keys, seq_len: int) -> dict[str, Any]:
    """Settings of the rotary positions.

    transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 both in `rope_parameters`; the former goes
    before, as transformers has it.

    Raises:
        UsageError: A scaling that StackWise has not.
    """
    written = keys.get("rope_scaling") or keys.get("rope_parameters") or {}
    keys.ignore("rope_parameters")
    if not isinstance(written, dict):
        raise keys.refusal("rope_scaling", written, "a mapping")
    keys.only("partial_rotary_factor", 1.0, 1)
    theta = keys.number("rope_theta", 10_000.0)
    inner = Keys(written)
    inner.only("partial_rotary_factor", 1.0, 1)
    settings: dict[str, Any] = {"rope_theta": inner.number("rope_theta", theta)}
    kind = inner.get("rope_type", inner.get("type", "default"))
    inner.ignore("type")
    if kind != "default":
        if kind not in ROPE_KEYS:
            raise keys.refusal("rope_type", kind, ", ".join(("default", *ROPE_KEYS)))
        required, optional = ROPE_KEYS[kind]
        scaling: dict[str, Any] = {"kind": kind}
        for key in (*required, *optional):
            # Where the model was trained before it was scaled is left out where that is all it takes.
            value = inner.get(key, seq_len if key.startswith("original") and key in required else None)
            if key in required or value is not None:
                scaling[key] = _rope_value(inner, key, value)
        settings["rope_scaling"] = scaling
    inner.finish()
    return settings


def _rope_value(keys: Keys, key: str, value: Any) -> Any:
    if key == "truncate":
        return keys.flag(key, True)
    if key == "original_max_position_embeddings":
        return keys.size(key, value)
    return keys.number(key, value)


def rope_keys(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `rope_settings`, as transformers 5 reads it and, where nothing is scaled, 4 as well."""
    scaling = getattr(model, "rope_scaling", None)
    if scaling is None or scaling.name == "none":
        rope = {"rope_type": "default", "rope_theta": model.rope_theta}
        return {"rope_parameters": rope, "rope_theta": model.rope_theta}
    given = {key: value for key, value in scaling.plain().items() if value is not None and key != "kind"}
    rope = {"rope_type": scaling.name, **given, "rope_theta": model.rope_theta}
    return {"rope_parameters": rope, "rope_theta": model.rope_theta}


def read_description(family: Family, config: Mapping[str, Any]) -> Description:
    """What a config.json says, its settings checked.

    Raises:
        UsageError: It says what cannot be done exactly, or what cannot be.
    """
    description = family.read(config)
    entry = config.get("stackwise")
    if isinstance(entry, dict) and not isinstance(family, StackWise):
        check_format(entry)
        own = {"mask_token_id": Keys(entry).token("mask_token_id")}
        description = dataclasses.replace(description, special_ids={**description.special_ids, **own})
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


def describe(model: ModelConfig, description: Description, prefer: str | None = None) -> tuple[Family, dict[str, Any]]:
    """The family that a rack is of, and its config.json: one that reads back as the same rack.

    Args:
        model: The rack's configuration.
        description: Its other facts; the settings in it are not used.
        prefer: The family to try first; "stackwise" gives the native format.
    """
    order: Iterable[str] = FAMILIES.names()
    for name in dict.fromkeys((*([prefer] if prefer else []), *order)):
        family = FAMILIES[name]()
        config = family.write(model, description)
        if config is None:
            continue
        special = {key: description.special_ids.get(key) for key in SPECIAL if key != "mask_token_id"}
        entry = {"format": FORMAT, "version": __version__, **config.pop("stackwise", {})}
        entry |= {
            "mask_token_id": description.special_ids.get("mask_token_id"),
            "separator_id": description.special_ids.get("eos_token_id"),
        }
        config = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "vocab_size": description.vocab_size,
            **config,
            **special,
            "stackwise": entry,
        }
        if isinstance(family, StackWise) or _same_rack(family, config, model, description):
            return family, config
    raise AssertionError("every rack is of the native family")


def _same_rack(family: Family, config: Mapping[str, Any], model: ModelConfig, description: Description) -> bool:
    try:
        back = read_description(family, config)
        settings = back.config
    except UsageError:
        return False
    alike = settings.specification() == model.specification() and settings.n_blocks == model.n_blocks
    facts = (back.vocab_size, back.max_seq_len, back.causal, settings.tie_embeddings)
    return alike and facts == (
        description.vocab_size,
        description.max_seq_len,
        description.causal,
        model.tie_embeddings,
    )


def part_shapes(description: Description, part: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a part, as its module names them, and their shapes; without those of kinds from outside.

    A tied projection is the front's.
    """
    model = description.config
    width, vocabulary = model.d_model, description.vocab_size
    if part == FRONT:
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (vocabulary, width)}
        if model.positions == "learned":
            shapes["positions.weight"] = (description.max_seq_len, width)
        return shapes
    if part == HEAD:
        shapes = _norm(model, "norm", width)
        return shapes if model.tie_embeddings else shapes | {"projection": (vocabulary, width)}
    shapes = _norm(model, "attention_norm", width) | _norm(model, "ffn_norm", width)
    for place, kind in (("attention", model.attention), ("ffn", model.ffn)):
        for name, matrix in kind.matrices(model).items():
            shapes[f"{place}.{name}.weight"] = (matrix.outputs, matrix.inputs)
            if matrix.bias:
                shapes[f"{place}.{name}.bias"] = (matrix.outputs,)
    return shapes


def _norm(model: ModelConfig, name: str, width: int) -> dict[str, tuple[int, ...]]:
    names = ("weight", "bias") if model.norm == "layernorm" else ("weight",)
    return {f"{name}.{kind}": (width,) for kind in names}


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether a tensor's name in a file is one of some patterns."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)
