"""BERT and RoBERTa, in and out; ModernBERT: local and global attention in turn, rotary positions, GeGLU."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from stackwise.config.model import ModelConfig
from stackwise.model.kinds import GELU, GeGLU, MultiHead, TransformHead
from stackwise.pretrained.builtin import GELUS, activation_key, attention_biases, ffn_bias, windows
from stackwise.pretrained.families import BLOCK, HEAD, Description, Family, TensorRef
from stackwise.pretrained.keys import Keys, rope_keys, rope_settings, special_ids


class Bert(Family):
    """BERT (arXiv 1810.04805) with its head for masked tokens, or without: then that starts afresh."""

    model_type: ClassVar[str] = "bert"
    architecture: ClassVar[str] = "BertForMaskedLM"
    base: ClassVar[str] = "bert."
    block: ClassVar[str] = "encoder.layer.{}."
    front_names: ClassVar[Mapping[str, str]] = {
        "embedding": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "types": "embeddings.token_type_embeddings",
        "norm": "embeddings.LayerNorm",
    }
    block_names: ClassVar[Mapping[str, str]] = {
        "attention.q": "attention.self.query",
        "attention.k": "attention.self.key",
        "attention.v": "attention.self.value",
        "attention.o": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "ffn.up": "intermediate.dense",
        "ffn.down": "output.dense",
        "ffn_norm": "output.LayerNorm",
    }
    task_names: ClassVar[Mapping[str, str]] = {
        "dense": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "projection": "cls.predictions.decoder.weight",
        "bias": "cls.predictions.bias",
    }
    other_bias: ClassVar[str] = "cls.predictions.decoder.bias"
    """The head's bias under its other name."""
    ignored: ClassVar[Sequence[str]] = (r"(bert\.|roberta\.)?embeddings\.(position|token_type)_ids",)
    unused: ClassVar[Sequence[str]] = (r"(bert\.|roberta\.)?pooler\..*", r"cls\.seq_relationship\..*")
    offset: ClassVar[bool] = False
    """Whether positions are counted from behind the id of padding."""

    def read(self, config: Mapping[str, Any]) -> Description:
        keys = Keys(config)
        padding = keys.token("pad_token_id")
        offset = (1 if padding is None else padding) + 1 if self.offset else 0
        rows = keys.size("max_position_embeddings", 512)
        if rows <= offset:
            raise keys.refusal("max_position_embeddings", rows, f"more than the {offset} before the first position")
        keys.only("position_embedding_type", "absolute")
        for key in ("is_decoder", "add_cross_attention"):
            keys.only(key, False)
        keys.dropout("classifier_dropout")  # of heads that are not read
        keys.ignore("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers")
        keys.ignore("pooler_size_per_head", "pooler_type", "directionality")
        activation = keys.choice("hidden_act", "gelu", GELUS)
        model = {
            "d_model": keys.size("hidden_size"),
            "n_heads": keys.size("num_attention_heads"),
            "d_ff": keys.size("intermediate_size"),
            "architecture": {"n_stacks": keys.size("num_hidden_layers"), "blocks_per_stack": 1},
            "attention": {"kind": "mha"},
            "ffn": {"kind": "gelu", "activation": activation},
            "head": {"kind": "transform", "activation": activation},
            "norm": "layernorm",
            "norm_place": "post",
            "norm_eps": keys.number("layer_norm_eps", 1e-12, 1.0),
            "positions": "learned",
            "position_offset": offset,
            "embedding_norm": True,
            "token_types": keys.size("type_vocab_size", 2),
            "bias": True,
            "tie_embeddings": keys.flag("tie_word_embeddings", True),
            "max_seq_len": rows - offset,
        }
        notes = keys.dropout("hidden_dropout_prob", "attention_probs_dropout_prob")
        keys.finish()
        return Description(
            model,
            keys.size("vocab_size"),
            rows - offset,
            causal=False,
            masked_head=True,
            special_ids=special_ids(keys),
            notes=notes,
        )

    def write(self, model: ModelConfig, description: Description) -> dict[str, Any] | None:
        offset = model.position_offset
        if not isinstance(model.head, TransformHead) or not isinstance(model.ffn, GELU) or model.token_types < 1:
            return None
        return {
            "hidden_size": model.d_model,
            "intermediate_size": model.ffn_width,
            "num_hidden_layers": model.n_blocks,
            "num_attention_heads": model.n_heads,
            "max_position_embeddings": description.max_seq_len + offset,
            "type_vocab_size": model.token_types,
            "hidden_act": activation_key(model.ffn.activation),
            "layer_norm_eps": model.norm_eps,
            "initializer_range": model.init_std,
            "hidden_dropout_prob": model.dropout,
            "attention_probs_dropout_prob": model.dropout,
            "tie_word_embeddings": model.tie_embeddings,
            **({"pad_token_id": offset - 1} if self.offset else {}),
        }

    def refs(self, description: Description, part: str, base: str, stored: Iterable[str] = ()) -> dict[str, TensorRef]:
        """See `Family.refs`; the first files of BERT call the parameters of norms gamma and beta."""
        refs, there = super().refs(description, part, base, stored), frozenset(stored)
        tied = description.config.tie_embeddings
        for name, ref in refs.items():
            older = re.sub(r"LayerNorm\.(weight|bias)$", lambda m: f"LayerNorm.{_OLDER[m[1]]}", ref.name)
            if ref.name not in there and older in there:
                refs[name] = dataclasses.replace(ref, name=older)
        # Where the head is not tied its two biases are two, and the projection's is the one that counts.
        if part == HEAD and (not tied or (refs["bias"].name not in there and self.other_bias in there)):
            refs["bias"] = TensorRef("", self.other_bias)
        return refs

    def copies(self, description: Description) -> dict[str, str]:
        return {} if description.config.tie_embeddings else {self.other_bias: self.task_names["bias"]}

    def tied(self, description: Description) -> list[str]:
        return [*super().tied(description), re.escape(self.other_bias), re.escape(self.task_names["bias"])]


_OLDER = {"weight": "gamma", "bias": "beta"}


class Roberta(Bert):
    """RoBERTa (arXiv 1907.11692): its table of positions has rows in front that only padding uses."""

    model_type: ClassVar[str] = "roberta"
    architecture: ClassVar[str] = "RobertaForMaskedLM"
    base: ClassVar[str] = "roberta."
    task_names: ClassVar[Mapping[str, str]] = {
        "dense": "lm_head.dense",
        "norm": "lm_head.layer_norm",
        "projection": "lm_head.decoder.weight",
        "bias": "lm_head.bias",
    }
    other_bias: ClassVar[str] = "lm_head.decoder.bias"
    offset: ClassVar[bool] = True


GLOBAL, LOCAL = "full_attention", "sliding_attention"
"""What config.json calls attention over the whole row, and within a window to both sides."""
BASES = {GLOBAL: 160_000.0, LOCAL: 10_000.0}
"""Bases of the rotary wavelengths where they are left out."""


class ModernBert(Family):
    """ModernBERT (arXiv 2412.13663) with its head for masked tokens, or without: then that starts afresh.

    Of `local_attention` positions a position sees half to each side, beside itself.
    """

    model_type: ClassVar[str] = "modernbert"
    architecture: ClassVar[str] = "ModernBertForMaskedLM"
    front_names: ClassVar[Mapping[str, str]] = {"embedding": "embeddings.tok_embeddings", "norm": "embeddings.norm"}
    block_names: ClassVar[Mapping[str, str]] = {
        "attention_norm": "attn_norm",
        **{f"attention.{name}": "attn.Wqkv" for name in "qkv"},
        "attention.o": "attn.Wo",
        "ffn_norm": "mlp_norm",
        **{f"ffn.{name}": "mlp.Wi" for name in ("gate", "up")},
        "ffn.down": "mlp.Wo",
    }
    head_names: ClassVar[Mapping[str, str]] = {"input_norm": "final_norm"}
    task_names: ClassVar[Mapping[str, str]] = {
        "dense": "head.dense",
        "norm": "head.norm",
        "projection": "decoder.weight",
        "bias": "decoder.bias",
    }
    unused: ClassVar[Sequence[str]] = (r"classifier\..*",)

    def read(self, config: Mapping[str, Any]) -> Description:
        keys = Keys(config)
        blocks, seq_len = keys.size("num_hidden_layers"), keys.size("max_position_embeddings", 8192)
        attention_bias, ffn = keys.flag("attention_bias", False), keys.flag("mlp_bias", False)
        activation = keys.choice("hidden_activation", "gelu", GELUS)
        head = {
            "kind": "transform",
            "activation": keys.choice("classifier_activation", "gelu", GELUS),
            "input_norm": True,
            "layer_bias": keys.flag("classifier_bias", False),
            "bias": keys.flag("decoder_bias", True),
        }
        attention, rope = self._attention(keys, blocks, seq_len)
        keys.ignore("classifier_pooling", "sparse_prediction", "sparse_pred_ignore_index", "initializer_cutoff_factor")
        # how it is computed, or what transformers does not read of this architecture
        keys.ignore("deterministic_flash_attn", "reference_compile", "repad_logits_with_grad")
        keys.ignore("position_embedding_type", "layer_norm_eps")
        model: dict[str, Any] = {
            "d_model": keys.size("hidden_size"),
            "n_heads": keys.size("num_attention_heads"),
            "d_ff": keys.size("intermediate_size"),
            "architecture": {"n_stacks": blocks, "blocks_per_stack": 1},
            "attention": {"kind": "mha", **attention},
            "ffn": {"kind": "geglu", "activation": activation} | ({} if ffn == attention_bias else {"bias": ffn}),
            "head": head,
            "norm": "layernorm",
            "norm_eps": keys.number("norm_eps", 1e-5, 1.0),
            "norm_bias": keys.flag("norm_bias", False),
            "first_norm": False,
            "positions": "rope",
            "embedding_norm": True,
            "bias": attention_bias,
            "tie_embeddings": keys.flag("tie_word_embeddings", True),
            "max_seq_len": seq_len,
            **rope,
        }
        keys.dropout("classifier_dropout")  # of heads that are not read
        notes = keys.dropout("attention_dropout", "embedding_dropout", "mlp_dropout")
        keys.finish()
        return Description(
            model,
            keys.size("vocab_size"),
            seq_len,
            causal=False,
            masked_head=True,
            special_ids=special_ids(keys),
            notes=notes,
        )

    @staticmethod
    def _attention(keys: Keys, blocks: int, seq_len: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings of the window, and of the rotary positions.

        transformers 4 writes every how many blocks attention is global, and two bases; transformers 5 a list of blocks
        and the positions of each kind.
        """
        size, every = keys.size("local_attention", 128), keys.size("global_attn_every_n_layers", 3)
        kinds = keys.get("layer_types") or [LOCAL if index % every else GLOBAL for index in range(blocks)]
        if not isinstance(kinds, list) or len(kinds) != blocks or any(kind not in BASES for kind in kinds):
            raise keys.refusal("layer_types", kinds, f"{GLOBAL} or {LOCAL} for each of {blocks} blocks")
        written, rope = keys.get("rope_parameters", {}), dict[str, dict[str, Any]]()
        if not isinstance(written, dict):
            raise keys.refusal("rope_parameters", written, "a mapping")
        older = {GLOBAL: keys.number("global_rope_theta", BASES[GLOBAL]), LOCAL: keys.number("local_rope_theta", 1e4)}
        for kind, base in older.items():
            entry = written.get(kind) or {}
            if not isinstance(entry, dict):
                raise keys.refusal(f"rope_parameters.{kind}", entry, "a mapping")
            scaling = {"rope_scaling": keys.get("rope_scaling")} if keys.get("rope_scaling") else {}
            rope[kind] = rope_settings(Keys({"rope_theta": base, "rope_parameters": entry, **scaling}), seq_len)
        having = [index for index, kind in enumerate(kinds) if kind == LOCAL]
        if not having:
            return {}, rope[GLOBAL]
        bases = {kind: settings.pop("rope_theta") for kind, settings in rope.items()}
        if rope[GLOBAL] != rope[LOCAL]:
            raise keys.refusal("rope_parameters", written, f"the same scaling for {GLOBAL} and {LOCAL}")
        window: dict[str, Any] = {"window": size // 2 + 1, "window_sides": "both", "window_rope_theta": bases[LOCAL]}
        window |= {} if len(having) == blocks else {"window_blocks": having}
        return window, rope[GLOBAL] | {"rope_theta": bases[GLOBAL]}

    def write(self, model: ModelConfig, description: Description) -> dict[str, Any] | None:
        attention, head = model.attention, model.head
        if not isinstance(attention, MultiHead) or not isinstance(model.ffn, GeGLU) or model.kv_heads != model.n_heads:
            return None
        if not isinstance(head, TransformHead) or model.positions != "rope":
            return None
        size, having = windows(model)
        kinds = [LOCAL if index in having else GLOBAL for index in range(model.n_blocks)]
        rope, theta = rope_keys(model)["rope_parameters"], attention.window_rope_theta or model.rope_theta
        return {
            "hidden_size": model.d_model,
            "intermediate_size": model.ffn_width,
            "num_hidden_layers": model.n_blocks,
            "num_attention_heads": model.n_heads,
            "max_position_embeddings": description.max_seq_len,
            "hidden_activation": activation_key(model.ffn.activation),
            "classifier_activation": activation_key(head.activation),
            "norm_eps": model.norm_eps,
            "norm_bias": model.norm_bias,
            "initializer_range": model.init_std,
            "attention_bias": attention_biases(model)[0],
            "mlp_bias": ffn_bias(model),
            "classifier_bias": head.layer_bias,
            "decoder_bias": head.bias,
            "layer_types": kinds,
            "local_attention": 128 if size is None else 2 * (size - 1),
            "rope_parameters": {GLOBAL: rope, LOCAL: rope | {"rope_theta": theta}},
            **dict.fromkeys(("attention_dropout", "mlp_dropout"), model.dropout),
            "tie_word_embeddings": model.tie_embeddings,
        }

    def refs(self, description: Description, part: str, base: str, stored: Iterable[str] = ()) -> dict[str, TensorRef]:
        """See `Family.refs`: queries, keys and values are rows of one matrix, the gate and `up` of another."""
        refs = super().refs(description, part, base, stored)
        if not part.startswith(BLOCK):
            return refs
        widths = {"qkv": description.config.heads_width, "gate up": description.config.ffn_width}
        for name, ref in refs.items():
            layer = name.split(".")[1]
            for layers, width in widths.items():
                order = layers.split() if " " in layers else list(layers)
                if layer in order:
                    first = order.index(layer) * width
                    refs[name] = dataclasses.replace(ref, rows=(first, first + width))
        return refs
