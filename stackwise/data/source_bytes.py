"""How many bytes of source text each token stands for, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Ids = np.ndarray[Any, np.dtype[np.uint32]]
Table = np.ndarray[Any, np.dtype[np.int64]]


def byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte: itself where it can be seen, else one from 256 up."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(hidden)) for byte in range(256)]


def bytes_between(text: str, offsets: Sequence[tuple[int, int]]) -> Ids:
    """Bytes of each token (uint32 [n]) of a text, from where the tokens lie in it (start, end; in characters).

    A token has what lies between its predecessor's end and its own; the last one the rest too. Tokens that share a
    character (the bytes of one) leave it to the first of them.
    """
    ends = np.fromiter((end for _, end in offsets), np.int64, len(offsets))
    if not len(ends):
        return np.empty(0, np.uint32)
    ends = np.maximum.accumulate(ends)
    ends[-1] = len(text)
    if not text.isascii():
        code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        widths = 1 + (code_points > 0x7F) + (code_points > 0x7FF) + (code_points > 0xFFFF)
        ends = np.concatenate(([0], np.cumsum(widths)))[ends]
    return np.diff(ends, prepend=0).astype(np.uint32)


def byte_table(spec: dict[str, Any], vocab_size: int) -> Table | None:
    """Bytes of each id (int64 [vocab_size]; specials 0), or None where that is not the id's own.

    It is for a byte-level BPE that has every byte and neither normalises nor adds nor drops anything: a token's
    text is a letter a byte.

    Args:
        spec: The tokenizer.json.
        vocab_size: All ids.
    """
    model, letters = spec["model"], set(byte_letters())
    stages = _flat(spec["pre_tokenizer"], "pretokenizers")
    byte_level = [stage for stage in stages if stage["type"] == "ByteLevel"]
    exact = (
        model["type"] == "BPE"
        and not _flat(spec["normalizer"], "normalizers")
        and len(byte_level) == 1
        and stages[-1] is byte_level[0]
        and not byte_level[0]["add_prefix_space"]
        and all(stage["type"] in ("Split", "Digits") and stage.get("behavior") != "Removed" for stage in stages[:-1])
        and letters <= model["vocab"].keys()
        and not model["continuing_subword_prefix"]
        and not model["end_of_word_suffix"]
    )
    if not exact:
        return None
    table = np.zeros(vocab_size, np.int64)
    for token, i in model["vocab"].items():
        table[i] = len(token)
    for added in spec["added_tokens"]:
        if not added["special"] and (added["lstrip"] or added["rstrip"]):
            return None
        table[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return table


def _flat(stage: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if stage is None:
        return []
    return [flat for part in stage[inner] for flat in _flat(part, inner)] if stage["type"] == "Sequence" else [stage]
