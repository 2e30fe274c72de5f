"""Blocks trained for integers, as compressed-tensors packs them (`pack-quantized`): its names, shapes and settings.

Shapes in names: O outputs, I inputs, G groups of a row, b bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stackwise.config.training import Quantization
from stackwise.errors import UsageError
from stackwise.model.formats import Integers
from stackwise.model.projections import AdaptedLinear, QuantizedLinear, projections
from stackwise.pretrained.families import TensorRef

FORMAT = "pack-quantized"
PACKED, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
INPUT_SCALE, INPUT_ZERO = "input_scale", "input_zero_point"
KINDS = (PACKED, SCALE, ZERO, SHAPE, INPUT_SCALE, INPUT_ZERO)
"""What stands for a layer's `weight`: int32 [O, I b / 32], float [O, G], int32 [O b / 32, G], and both sizes.

Where what enters is rounded in a fixed range, the grid that spans it, too: float [1], int8 [1].
"""

WIDEN = "export it with --format hf: its weights are then the rounded ones"


class CompressedPart(dict[str, Tensor]):
    """A block's tensors, four in place of each weight that is packed; `settings` of the packed ones."""

    settings: Quantization


def compressed_part(block: nn.Module, part: str) -> CompressedPart:
    """A block's tensors with its packed integers in place of weights.

    Raises:
        UsageError: Its weights are no integers, or what compressed-tensors has no form for.
    """
    state, settings = CompressedPart(block.state_dict()), set[str]()
    for path, layer in projections(block).items():
        codec = layer.codec if isinstance(layer, QuantizedLinear) else None
        if not isinstance(codec, Integers) or not layer.packed:
            raise UsageError(f"{part} was not trained for integers (training.quantization)", hint=WIDEN)
        if isinstance(layer, AdaptedLinear):
            raise UsageError(f"{part} has adapters beside its integers", hint=WIDEN)
        group = codec.settings.group
        if isinstance(group, int) and layer.in_features % group:
            raise UsageError(f"{part} {path}: groups of {group} do not divide {layer.in_features}", hint=WIDEN)
        state.settings = codec.settings
        settings.add(codec.settings.name)
        for name in ("codes", "scales", "zeros"):
            state.pop(f"{path}.{name}", None)
        state.update({f"{path}.{name}": tensor for name, tensor in _layer(layer, codec).items()})
    if len(settings) != 1:
        raise UsageError(f"{part} has no weights that integers could stand for", hint=WIDEN)
    return state


def compressed_refs(refs: Mapping[str, TensorRef], part: CompressedPart) -> dict[str, TensorRef]:
    """Where the tensors of a part go, of which some weights are packed.

    Raises:
        UsageError: The family has layers in another form than a matrix of their own.
    """
    compressed: dict[str, TensorRef] = {}
    for name, ref in refs.items():
        stem = name.removesuffix("weight")
        if f"{stem}{PACKED}" not in part:
            compressed[name] = ref
            continue
        if ref.transpose or ref.rows is not None:
            raise UsageError(f"{ref.name} is no linear layer that compressed-tensors could pack", hint=WIDEN)
        for kind in KINDS:
            if f"{stem}{kind}" in part:
                compressed[f"{stem}{kind}"] = TensorRef(ref.file, f"{ref.name.removesuffix('weight')}{kind}")
    return compressed


def _layer(layer: QuantizedLinear, codec: Integers) -> dict[str, Tensor]:
    outputs, inputs, bits = layer.out_features, layer.in_features, codec.settings.bits
    held = {name: getattr(layer, name).detach() for name in layer.layout}
    rows, columns = codec.grid(outputs, inputs)
    scales = held["scales"].view(rows, columns)
    tensors = {
        PACKED: _words(codec.numbers(held["codes"], outputs, inputs), bits),
        SCALE: scales if codec.settings.group != "tensor" else scales.flatten(),
        SHAPE: torch.tensor([outputs, inputs]),
    }
    if layer.span is not None and layer.rounds is not None:
        tensors[INPUT_SCALE], zero = layer.rounds.spanning(*torch.split(layer.span.float(), 1))
        if not layer.rounds.settings.symmetric:
            tensors[INPUT_ZERO] = zero.to(torch.int8)
    if "zeros" not in held:
        return tensors
    zeros = held["zeros"].view(rows, columns)
    if codec.settings.group == "tensor":
        return tensors | {ZERO: zeros.flatten()}
    return tensors | {ZERO: _words((zeros.long() - codec.low).T, bits).T.contiguous()}


def _words(numbers_RN: Tensor, bits: int) -> Tensor:
    """Numbers of b bits, int64 [R, N], as int32 [R, N b / 32]: each row by itself, the first in the lowest bits."""
    rows, count = numbers_RN.shape
    padded = torch.nn.functional.pad(numbers_RN, (0, -count % 32)).view(rows, -1, 32)
    words = torch.zeros(*padded.shape[:2], bits, dtype=torch.int64)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        words[..., word] |= padded[..., place] << shift
        if shift + bits > 32:  # the rest of it opens the next word
            words[..., word + 1] |= padded[..., place] >> (32 - shift)
    flat = words.flatten(1)[:, : -(-count * bits // 32)]
    return (((flat & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)


def quantization_config(layers: Mapping[str, Quantization], others: Iterable[str]) -> dict[str, Any]:
    """The entry `quantization_config` of config.json.

    Args:
        layers: Names of the layers that are packed, each with its settings.
        others: Names of the linear layers that are not.
    """
    groups: dict[str, tuple[Quantization, list[str]]] = {}
    for name, settings in layers.items():
        groups.setdefault(settings.name, (settings, []))[1].append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": sorted(others),
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "weights": _scheme(settings),
                "input_activations": _activations(settings),
                "output_activations": None,
                # Said again: where activations are rounded too, the library would take another form by itself.
                "format": FORMAT,
            }
            for number, (settings, names) in enumerate(groups.values())
        },
    }


def _scheme(settings: Quantization) -> dict[str, Any]:
    group = settings.group if isinstance(settings.group, int) else None
    strategy = "group" if group else settings.group
    return {
        "num_bits": settings.bits,
        "type": "int",
        "symmetric": settings.symmetric,
        "strategy": strategy,
        "group_size": group,
        "dynamic": False,
    }


def _activations(settings: Quantization) -> dict[str, Any] | None:
    if settings.activations is None:
        return None
    dynamic = settings.activations_range == "token"
    how = {"type": "int", "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
    return {"num_bits": settings.activations, "symmetric": settings.activations_symmetric} | how
