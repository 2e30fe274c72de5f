"""Adapters in peft's layout, in and out: adapter_config.json, adapter_model.safetensors.

A directory of them comes from elsewhere, and is held against the checkpoint that it is for when it is opened: names,
shapes, and every setting. What a configuration asks for beyond low-rank pairs on layers of blocks is refused by name.
Opening and hashing import no torch.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise import files
from stackwise.config.adapters import LORA, is_target, layers
from stackwise.errors import NotFound, UsageError, line_of
from stackwise.files import expanded
from stackwise.identity import Hex, content_id
from stackwise.pretrained.checkpoint import Checkpoint
from stackwise.pretrained.families import BLOCK, TensorRef
from stackwise.pretrained.reading import ADAPTER_WEIGHTS as WEIGHTS
from stackwise.pretrained.reading import CONFIG_BYTES, FLOATS, PICKLES, Reader, read_header
from stackwise.text import printable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SETTINGS = "adapter_config.json"

MERGED = 4 << 20
"""Numbers that are added to a weight at once."""

PREFIX = "base_model.model."
"""What the names of all tensors begin with."""
_TENSOR = re.compile(r"base_model\.model\.(?P<module>[\w.]+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")

READ = {"peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "alpha_pattern"}
READ |= {"init_lora_weights"}
WITHOUT_EFFECT = {"auto_mapping", "inference_mode", "peft_version", "revision", "task_type", "target_modules"}
WITHOUT_EFFECT |= {"exclude_modules", "rank_pattern", "fan_in_fan_out", "layers_pattern", "layers_to_transform"}
WITHOUT_EFFECT |= {"megatron_core", "qalora_group_size", "runtime_config"}
"""Settings that say what the tensors say as well, or nothing of what is computed."""
PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
"""Ways to draw an adapter that leave the weights beside it as they are."""


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a layer: scale · B A, as plain data."""

    a: TensorRef
    b: TensorRef
    scale: float


@dataclass(frozen=True)
class Target:
    """A layer of ours within a module of transformers; `rows`: the outputs of the module that are its, None: all."""

    part: str
    layer: str
    rows: tuple[int, int] | None
    sides: tuple[int, int]  # how many numbers leave and enter the layer


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds adapters in peft's layout."""
    return os.path.lexists(directory / SETTINGS)


def base_of(directory: Path, given: str | None) -> Path:
    """The directory of the model that adapters are for.

    Args:
        directory: Theirs.
        given: Where the user says that it is (`init.base`); None: as their configuration has it.

    Raises:
        NotFound: There is nothing there.
    """
    named = given if given is not None else read_settings(directory).get("base_model_name_or_path")
    source = "init.base" if given is not None else f"{directory / SETTINGS}: base_model_name_or_path"
    if not isinstance(named, str) or not named:
        raise NotFound(f"{source} names no model", hint="name the model that the adapter is for: init.base")
    places = [expanded(named).absolute(), (directory / named).absolute()]
    for place in places if given is None else places[:1]:
        if place.is_dir():
            return place
    raise NotFound(
        f"{source}: {printable(named)}: there is no such directory", hint="name where the model is: init.base=DIR"
    )


def read_settings(directory: Path) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
        UsageError: It cannot be read.
    """
    path = directory / SETTINGS
    try:
        settings = files.read_json(path, limit=CONFIG_BYTES)
    except (OSError, ValueError) as error:
        why = getattr(error, "message", None) or line_of(error, "it is no JSON")
        raise UsageError(f"{path} cannot be read: {printable(why)}", hint="get the adapter again") from None
    if not isinstance(settings, dict):
        raise UsageError(f"{path} cannot be read: it is no mapping", hint="get the adapter again")
    return settings


class AdapterDirectory:
    """Adapters over a checkpoint, checked when they are opened.

    Args:
        directory: Theirs.
        base: The checkpoint.

    Attributes:
        pairs: What they add, by part and layer.

    Raises:
        UsageError: They are damaged, for another model, or ask for what StackWise cannot do exactly.
    """

    def __init__(self, directory: Path, base: Checkpoint) -> None:
        self.directory, self.settings = directory, read_settings(directory)
        self._check_settings()
        if not os.path.lexists(directory / WEIGHTS):
            raise self._without_weights()
        self._table = read_header(directory / WEIGHTS)
        self._reader = Reader(directory, {WEIGHTS: self._table})
        self.pairs = self._pairs(base)

    @property
    def rank(self) -> int:
        """The rank of most of them."""
        ranks = Counter(self._table[pair.a.name].shape[0] for pairs in self.pairs.values() for pair in pairs.values())
        return ranks.most_common(1)[0][0]

    @property
    def rslora(self) -> bool:
        """Whether they are scaled by alpha / sqrt(rank)."""
        return bool(self.settings.get("use_rslora"))

    @property
    def layers(self) -> list[str]:
        """The layers that have one in some block."""
        return sorted({layer for pairs in self.pairs.values() for layer in pairs})

    @property
    def lowest(self) -> int:
        """The lowest block that has one."""
        return min(int(part.removeprefix(BLOCK)) for part in self.pairs)

    def digest(self, part: str) -> Hex:
        """What identifies a part's: every number and scale."""
        return digest_of(self._reader, self.pairs[part])

    def _check_settings(self) -> None:
        settings, path = self.settings, self.directory / SETTINGS

        def refuse(key: str, why: str = "which StackWise cannot do exactly") -> UsageError:
            hint = "merge it where it was trained: PeftModel.from_pretrained(...).merge_and_unload()"
            return UsageError(f"{path}: {key} is {printable(f'{settings[key]!r:.60}')}, {why}", hint=hint)

        if settings.get("peft_type") != "LORA":
            settings.setdefault("peft_type", None)
            raise refuse("peft_type", "and StackWise reads LORA")
        for key, value in settings.items():
            neutral = value in (None, False, "", "none") or value == {} or value == []
            if key not in READ | WITHOUT_EFFECT and not neutral:
                raise refuse(printable(key))
        start = settings.get("init_lora_weights", True)
        if not (isinstance(start, bool) or start in PLAIN_STARTS):
            raise refuse("init_lora_weights", "which changes the weights beside the adapter")
        for key, kinds in (("r", int), ("lora_alpha", (int, float)), ("lora_dropout", (int, float))):
            value = settings.get(key, 0.0 if key == "lora_dropout" else 8)
            fine = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
            if not fine or value < 0 or (key == "r" and value == 0) or (key == "lora_dropout" and value >= 1):
                raise refuse(key, "which it cannot be")
        patterns = settings.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or not all(_plain_pattern(p) and _number(v) for p, v in patterns.items()):
            raise refuse("alpha_pattern", "and only names with simple patterns, and numbers, are read")

    def _without_weights(self) -> UsageError:
        for name in sorted(os.listdir(self.directory)):
            if name.endswith(PICKLES):
                return UsageError(
                    f"{self.directory / printable(name)} is a pickle, which runs code when it is opened",
                    hint="convert it where that does no harm: PeftModel.from_pretrained(M, DIR).save_pretrained(NEW)",
                )
        return UsageError(f"{self.directory / WEIGHTS} is missing", hint="get the adapter again")

    def _pairs(self, base: Checkpoint) -> dict[str, dict[str, LowRank]]:
        targets, by_layer = targets_of(base), dict[str, dict[str, LowRank]]()
        modules: dict[str, set[str]] = {}
        for name in self._table:
            match = _TENSOR.fullmatch(name)
            if match is None:
                what = f"tensor {printable(name)} is no low-rank pair of a layer"
                raise UsageError(f"{self.directory / WEIGHTS}: {what}", hint="merge the adapter where it was trained")
            modules.setdefault(match["module"], set()).add(match["side"])
        if not modules:
            raise UsageError(f"{self.directory / WEIGHTS} has no tensors", hint="get the adapter again")
        for module, sides in modules.items():
            shown = f"{self.directory / WEIGHTS}: {printable(module)}"
            # One that was trained on the bare model lacks what names of the whole begin with.
            entries = targets.get(module) or targets.get(base.family.base + module)
            if entries is None:
                hint = f"the adapter is for another model, or for other layers than those of blocks: {base.directory}"
                raise UsageError(f"{shown} is no layer of a block of {base.directory.name}", hint=hint)
            if sides != {"A", "B"}:
                raise UsageError(f"{shown} has lora_{min(sides)} alone", hint="get the adapter again")
            a, b = (self._ref(module, side) for side in "AB")
            outputs = max(entry.rows[1] if entry.rows else entry.sides[0] for entry in entries)
            rank = self._table[a.name].shape[0] if len(self._table[a.name].shape) == 2 else 0
            for ref, shape in ((a, (rank, entries[0].sides[1])), (b, (outputs, rank))):
                stored = self._table[ref.name]
                if stored.dtype not in FLOATS:
                    raise UsageError(f"{shown} is {printable(stored.dtype)}; StackWise reads {', '.join(FLOATS)}")
                if stored.shape != shape or not rank or rank > min(outputs, shape[1] if ref is a else outputs):
                    what = f"has a matrix of {list(stored.shape)}, which the layer ({outputs} × {entries[0].sides[1]})"
                    raise UsageError(f"{shown} {what} cannot have", hint="the adapter is for another model")
            scale = self._scale(module, rank)
            for entry in entries:
                pair = LowRank(a, dataclasses.replace(b, rows=entry.rows), scale)
                by_layer.setdefault(entry.part, {})[entry.layer] = pair
        return by_layer

    def _ref(self, module: str, side: str) -> TensorRef:
        plain = f"{PREFIX}{module}.lora_{side}.weight"
        return TensorRef(WEIGHTS, plain if plain in self._table else f"{PREFIX}{module}.lora_{side}.default.weight")

    def _scale(self, module: str, rank: int) -> float:
        alpha = self.settings.get("lora_alpha", 8)
        for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
            # As peft's get_pattern_key: the first that matches the end of the name from a dot on.
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if self.rslora else rank)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain_pattern(pattern: str) -> bool:
    # Without groups a pattern cannot take exponential time, and with few stars it takes little.
    plain = re.fullmatch(r"\^?(?:\w|\.|-|\\d|\\\.|[*+])+", pattern) and sum(map(pattern.count, "*+")) <= 3
    if not plain or len(pattern) > 200:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def targets_of(base: Checkpoint) -> dict[str, list[Target]]:
    """The modules of transformers that are layers of blocks: what of each is which layer of ours."""
    targets: dict[str, list[Target]] = {}
    for part in base.parts:
        if not part.startswith(BLOCK):
            continue
        sides = layers(base.description.config, int(part.removeprefix(BLOCK)))
        for name, ref in base.names(part).items():
            layer, _, kind = name.rpartition(".")
            if kind != "weight" or layer not in sides:
                continue
            module = base.family.base + ref.name.removeprefix(base.base).removesuffix(".weight")
            targets.setdefault(module, []).append(Target(part, layer, ref.rows, sides[layer]))
    return targets


def named_layers(base: Checkpoint, targets: Sequence[str]) -> list[str]:
    """Targets in our names: one that ends the names of modules of transformers stands for the layers that these are."""
    modules = targets_of(base)
    layers: list[str] = []
    for target in targets:
        ends = (entries for module, entries in modules.items() if f".{module}".endswith(f".{target}"))
        theirs = sorted({entry.layer for entries in ends for entry in entries})
        ours = any(is_target(target, entry.layer) for entries in modules.values() for entry in entries)
        layers += [target] if ours or not theirs else theirs
    return list(dict.fromkeys(layers))


def digest_of(reader: Reader, pairs: Mapping[str, LowRank]) -> Hex:
    """What identifies the adapters of a part."""
    entries: list[Any] = []
    for layer, pair in sorted(pairs.items()):
        about = [[reader.stored(ref).dtype, list(reader.shape(ref)), reader.digest(ref)] for ref in (pair.a, pair.b)]
        entries.append([layer, pair.scale, *about])
    return content_id("adapters", entries)


def read_pairs(directory: Path, pairs: Mapping[str, LowRank]) -> tuple[Hex, dict[str, Tensor]]:
    """The adapters of a part, float32, as a block's state dict has them; and their digest as they are now.

    Raises:
        UsageError: The file is missing, cut off, or lacks a tensor.
    """
    import torch

    reader, tensors = Reader(directory), {}
    for layer, pair in pairs.items():
        prefix = f"{layer}.adapters.{LORA}"
        tensors[f"{prefix}.a"], tensors[f"{prefix}.b"] = (reader.tensor(ref).float() for ref in (pair.a, pair.b))
        tensors[f"{prefix}.scale"] = torch.tensor(pair.scale)
    return digest_of(reader, pairs), tensors


def merge(tensors: dict[str, Tensor], adapters: Mapping[str, Tensor]) -> None:
    """Add to a part's tensors, in place, what adapters add; the layers that have them become float32 at least."""
    import torch

    for name, a_RI in adapters.items():
        layer, marked, kind = name.partition(f".adapters.{LORA}.")
        if not marked or kind != "a":
            continue
        weight, prefix = tensors.pop(f"{layer}.weight"), f"{layer}.adapters.{LORA}"
        weight = weight if weight.element_size() >= 4 else weight.float()
        scale, b_OR = adapters[f"{prefix}.scale"].item(), adapters[f"{prefix}.b"]
        rows = max(1, MERGED // a_RI.shape[1])  # never all that a large layer's adapter adds, beside the layer
        for weight_rI, b_rR in zip(torch.split(weight, rows), torch.split(b_OR, rows), strict=True):
            weight_rI += scale * (b_rR @ a_RI)
        tensors[f"{layer}.weight"] = weight


@dataclass(frozen=True)
class Written:
    """A module's adapter as peft has it."""

    a: Tensor
    b: Tensor
    scale: float


def as_peft(base: Checkpoint, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Written]:
    """Adapters of blocks by the modules of transformers that they are on.

    Where several layers of ours are one module (GPT-2's c_attn), their pairs stand side by side: its rank is the sum of
    theirs, and what it adds is exactly theirs.

    Args:
        base: The checkpoint.
        parts: For each block its adapters, as a state dict has them.
    """
    import torch

    tensors: dict[str, Written] = {}
    for module, entries in targets_of(base).items():
        pairs = list(_pairs_of(entries, parts))
        if not pairs:
            continue
        scale = pairs[0][3]
        if len(entries) == 1:
            _, a, b, _ = pairs[0]
            tensors[module] = Written(a, b, scale)
            continue
        outputs = max(entry.rows[1] for entry in entries if entry.rows)
        wide = torch.zeros(outputs, sum(len(a) for _, a, _, _ in pairs), dtype=pairs[0][2].dtype)
        column = 0
        for entry, _, b, variant in pairs:
            assert entry.rows is not None
            wide[entry.rows[0] : entry.rows[1], column : column + b.shape[1]] = b * (variant / scale)
            column += b.shape[1]
        tensors[module] = Written(torch.cat([a for _, a, _, _ in pairs]), wide, scale)
    return tensors


def _pairs_of(
    entries: Sequence[Target], parts: Mapping[str, Mapping[str, Tensor]]
) -> Iterator[tuple[Target, Tensor, Tensor, float]]:
    for entry in entries:
        tensors, prefix = parts.get(entry.part, {}), f"{entry.layer}.adapters.{LORA}"
        if f"{prefix}.a" in tensors:
            yield entry, tensors[f"{prefix}.a"], tensors[f"{prefix}.b"], float(tensors[f"{prefix}.scale"])


def peft_settings(base: Checkpoint, modules: Mapping[str, Written], *, rslora: bool, dropout: float) -> dict[str, Any]:
    """The adapter_config.json of some modules' adapters."""
    ranks = {module: len(written.a) for module, written in modules.items()}
    alphas = {m: _whole(w.scale * (math.sqrt(ranks[m]) if rslora else ranks[m])) for m, w in modules.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    causal = base.description.causal and not base.description.masked_head
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": str(base.directory.absolute()),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        # Whole names: a last word may be that of other layers, too.
        "target_modules": sorted(modules),
        "rank_pattern": {re.escape(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(m): a for m, a in alphas.items() if a != alpha},
        "fan_in_fan_out": any(ref.transpose for part in base.parts for ref in base.names(part).values()),
        "bias": "none",
        "modules_to_save": None,
        "inference_mode": True,
    }


def _whole(value: float) -> float | int:
    """A number as it was written: scales are float32."""
    near = round(value, 4)
    return int(near) if near == int(near) else near


def peft_tensors(modules: Mapping[str, Written], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors."""
    sides = {f"{module}.lora_{s}.weight": t for module, w in modules.items() for s, t in (("A", w.a), ("B", w.b))}
    return {f"{PREFIX}{name}": tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in sides.items()}
