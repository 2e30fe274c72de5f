"""BERT and RoBERTa, in and out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from stackwise.config.model import ModelConfig
from stackwise.model.kinds import GELU, TransformHead
from stackwise.pretrained.builtin import GELUS, activation_key
from stackwise.pretrained.families import HEAD, Description, Family, TensorRef
from stackwise.pretrained.keys import Keys, special_ids


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
        """See `Family.read`."""
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
        """See `Family.write`."""
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
        """See `Family.copies`."""
        return {} if description.config.tie_embeddings else {self.other_bias: self.task_names["bias"]}

    def tied(self, description: Description) -> list[str]:
        """See `Family.tied`."""
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
