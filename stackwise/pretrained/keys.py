"""The keys of a config.json: each asked for by name and type; those that nobody asked for refused. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stackwise.config.model import ModelConfig
from stackwise.errors import UsageError
from stackwise.text import printable

FORMAT = 1
"""Version of the `stackwise` entry in config.json."""

LARGEST = 1 << 24
"""The largest size that an axis of a tensor may have, as in the configuration."""


SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")


INEXACT = "a model that asks for more is not exact"
BROKEN = "no model has that: correct config.json, or get the checkpoint again"


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

    def is_null(self, key: str) -> bool:
        """Whether a key is written as null, which may say something else than leaving it out."""
        return key in self._config and self._config[key] is None

    def size(self, key: str, default: int | None = None) -> int:
        """A length of an axis, or a number of things."""
        value = self.get(key, default)
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise self.refusal(key, value, f"a whole number from 1 to {LARGEST}", BROKEN)
        return value

    def number(self, key: str, default: float | None, most: float = 1e15) -> float:
        """A finite number above zero."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            raise self.refusal(key, value, f"a number above 0, at most {most:g}", BROKEN)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, value, "true or false", BROKEN)
        return value

    def token(self, key: str) -> int | None:
        """The id of a token; of several the first."""
        value = self.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if value is None or (type(value) is int and value < 0):  # some write -1 for none
            return None
        if type(value) is not int or value > LARGEST:
            raise self.refusal(key, value, "the id of a token", BROKEN)
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
            raise self.refusal(key, value, " or ".join(as_json(allowed) for allowed in values))

    def ignore(self, *keys: str) -> None:
        """Keys whose value has no effect on what the model computes."""
        self._asked.update(keys)

    def dropout(self, *keys: str) -> tuple[str, ...]:
        """A note of the dropout of the model's first training; what it computes does not depend on it."""
        values = {key: self.number(key, None, 1.0) for key in keys if self.get(key, 0) != 0}
        shown = ", ".join(f"{key} {value:g}" for key, value in values.items())
        return (f"dropout of its first training ({shown}) is not taken over: model.dropout sets it",) if shown else ()

    def finish(self) -> None:
        """Refuse what nobody asked for: it might change what the model computes."""
        self._quantized()
        for key, value in self._config.items():
            if key not in self._asked and value not in (None, False, [], {}):
                raise UsageError(
                    f"{printable(key)} is {as_json(value)}, which StackWise does not know of this architecture",
                    hint="if it does not change what the model computes, remove it from config.json",
                )

    def _quantized(self) -> None:
        """Refuse weights that were packed in few bits, by the name of what packed them."""
        for key in ("quantization_config", "compression_config"):
            if value := self.get(key):
                method = value.get("quant_method") if isinstance(value, dict) else value
                named = f"by {printable(method):.40}" if isinstance(method, str) else f"as {as_json(value)} says"
                raise UsageError(
                    f"{key}: the weights are quantized, {named}, and StackWise reads plain numbers",
                    hint="get the checkpoint that was quantized, or unpack it where its library is: "
                    "AutoModel….from_pretrained(DIR).dequantize().save_pretrained(NEW)",
                )

    @staticmethod
    def refusal(key: str, value: Any, allowed: str, hint: str = INEXACT) -> UsageError:
        """The error for a value that is not done; `hint`: what to do then."""
        there = "is missing" if value is None else f"is {as_json(value)}"
        return UsageError(f"{key} {there}; StackWise reads {allowed}", hint=hint)


def as_json(value: Any) -> str:
    """A value as config.json has it, in at most 60 characters that may be shown."""
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


def check_format(entry: Mapping[str, Any]) -> None:
    """Refuse the entry of a newer version.

    Raises:
        UsageError: It is one, or says no version.
    """
    written = entry.get("format")
    if type(written) is not int:
        raise UsageError(f"the stackwise entry is of format {as_json(written)}", hint="export it again")
    if written > FORMAT:
        raise UsageError(
            f"it is of format {written}; this version reads up to {FORMAT}",
            hint="install a newer version of stackwise",
        )


def special_ids(keys: Keys) -> dict[str, int | None]:
    """The ids of special tokens that a config.json names."""
    return {name: token for name in SPECIAL if (token := keys.token(name)) is not None}


ORIGINAL = "original_max_position_embeddings"
ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor", ORIGINAL), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), ()),
    "yarn": (
        ("factor", ORIGINAL),
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
    inner = Keys(written)
    inner.only("partial_rotary_factor", 1.0, 1)
    settings: dict[str, Any] = {"rope_theta": inner.number("rope_theta", keys.number("rope_theta", 10_000.0))}
    kind = inner.get("rope_type", inner.get("type", "default"))
    inner.ignore("type")
    if kind != "default":
        if not isinstance(kind, str) or kind not in ROPE_KEYS:
            raise keys.refusal("rope_type", kind, ", ".join(("default", *ROPE_KEYS)))
        if kind == "dynamic":  # which is scaled from the length in config.json on, whatever else is written
            inner.only(ORIGINAL, seq_len)
        required, optional = ROPE_KEYS[kind]
        scaling = {key: _rope_value(inner, key, seq_len) for key in (*required, *optional)}
        settings["rope_scaling"] = {"kind": kind} | {key: value for key, value in scaling.items() if value is not None}
    inner.finish()
    return settings


def _rope_value(keys: Keys, key: str, seq_len: int) -> Any:
    if key == ORIGINAL:
        return keys.size(key, seq_len)
    if key == "factor":
        implied = None if keys.get("rope_type", keys.get("type")) != "yarn" else seq_len / keys.size(ORIGINAL, seq_len)
        return keys.number(key, implied)
    if key.endswith("freq_factor"):
        return keys.number(key, None)
    if keys.get(key, 0) == 0 and key != "truncate":  # 0 counts as left out
        return None
    return keys.flag(key, True) if key == "truncate" else keys.number(key, None)


def dynamic_reach(settings: Mapping[str, Any]) -> int | None:
    """The longest row of a model whose scaling follows the length of its rows; None: it has no such scaling."""
    scaling = settings.get("rope_scaling", {})
    return int(scaling[ORIGINAL] * scaling["factor"]) if scaling.get("kind") == "dynamic" else None


def rope_keys(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `rope_settings`, as transformers 5 reads it and, where nothing is scaled, 4 as well."""
    scaling = model.rope_scaling
    if scaling.name == "none":
        rope = {"rope_type": "default", "rope_theta": model.rope_theta}
        return {"rope_parameters": rope, "rope_theta": model.rope_theta}
    settings = {key: value for key, value in scaling.plain().items() if value is not None and key != "kind"}
    if scaling.name == "dynamic":
        settings.pop(ORIGINAL)  # which is max_position_embeddings
    rope = {"rope_type": scaling.name, **settings, "rope_theta": model.rope_theta}
    return {"rope_parameters": rope, "rope_theta": model.rope_theta}
