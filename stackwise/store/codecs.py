"""How a row of activations becomes bytes, chosen for each boundary and part of its id.

A codec is a number format and, optionally, one of Zarr's own compressors over it:

    fp32, bf16, fp16    the number as it is
    fp8, int8           e4m3 or 8-bit integers, with a float32 scale for each position of each row
    …-blosc, …-zstd     the same bytes, compressed losslessly (Blosc with bitshuffle over Zstd; Zstd)

Encoding is a pure function of one row, so a row never depends on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from stackwise.errors import UsageError

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]
Compression = Literal["none", "blosc", "zstd"]

_FP8_MAX, _INT8_MAX = 448.0, 127.0
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array of a boundary: its name, Zarr data type, and shape of a row in terms of (seq, d_model)."""

    name: str
    data_type: str
    per_feature: bool

    @property
    def numpy(self) -> np.dtype[Any]:
        """The little-endian numpy type of the stored numbers."""
        return np.dtype(self.data_type).newbyteorder("<")

    def row_shape(self, seq_len: int, d_model: int) -> tuple[int, ...]:
        """Shape of one row."""
        return (seq_len, d_model) if self.per_feature else (seq_len,)

    def row_bytes(self, seq_len: int, d_model: int) -> int:
        """Bytes of one row, uncompressed."""
        return int(np.prod(self.row_shape(seq_len, d_model))) * self.numpy.itemsize


@dataclass(frozen=True)
class Codec:
    """A name, the arrays it stores, and what reading gives back.

    Args:
        name: As configurations and records call it.
        base: The number format.
        stored: The element type that the `activations` array's bits are ("bfloat16").
        decoded: The torch dtype that reading gives.
        arrays: `activations`, and `scale` where there is one.
        compression: The compressor over each chunk's bytes.
    """

    name: str
    base: str
    stored: str
    decoded: str
    arrays: tuple[ArraySpec, ...]
    compression: Compression = "none"

    @property
    def lossless(self) -> bool:
        """Whether a tensor of the decoded dtype comes back bit for bit."""
        return len(self.arrays) == 1

    @property
    def raw(self) -> bool:
        """Whether a row can be read straight into its place: its bytes lie in the file as the tensor has them."""
        return self.compression == "none" and self.lossless

    @property
    def decoded_itemsize(self) -> int:
        """Bytes of an element after reading."""
        return 4 if self.decoded == "float32" else 2

    def row_bytes(self, seq_len: int, d_model: int) -> int:
        """Bytes of a stored row, before compression."""
        return sum(spec.row_bytes(seq_len, d_model) for spec in self.arrays)

    def encode(self, x: torch.Tensor | Array) -> list[Array]:
        """The stored arrays of rows `x` [n, seq, d_model], C-contiguous and little-endian.

        Raises:
            UsageError: A number has no place in the format: not finite with a scale, or too large for fp16.
        """
        if self.base in ("fp8", "int8"):
            return _encode_scaled(x, self.base)
        if isinstance(x, np.ndarray):
            return [_encode_numpy(x, self.base)]
        import torch

        target = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.base]
        y = x.detach().to(device="cpu", dtype=target).contiguous()
        bits = y.view(torch.uint16).numpy() if target is torch.bfloat16 else y.numpy()
        if self.base == "fp16":
            _check_range(x, y)
        return [bits]

    def round_trip(self, x: torch.Tensor) -> torch.Tensor:
        """What reading gives of rows [n, seq, d_model] that were written, without a disk between.

        Returns:
            A tensor of the decoded dtype: on the device of `x` where the codec has no scale, else on the CPU.
        """
        import torch

        decoded: torch.dtype = getattr(torch, self.decoded)
        if self.lossless:
            y = x.detach().to(decoded)
            if self.base == "fp16":
                _check_range(x, y)
            return y
        stored, scale = self.encode(x)
        out = torch.empty(x.shape, dtype=decoded)
        decode_scaled(self.base, stored, scale, out)
        return out

    def compress(self, data: Array) -> Any:
        """The bytes of one whole chunk of one array, as its file has them."""
        if self.compression == "none":
            return data
        return _compressor(self.compression, data.dtype.itemsize).encode(np.ascontiguousarray(data))

    def decompress(self, data: bytes, out: Array) -> None:
        """Undo `compress` into `out`, whose size is known beforehand: no file decides how much memory is taken.

        Raises:
            ValueError: The bytes are not of that size.
        """
        flat = out.reshape(-1).view(np.uint8)
        if self.compression == "none":
            if len(data) != flat.nbytes:
                raise ValueError(f"{len(data)} bytes where {flat.nbytes} belong")
            flat[:] = np.frombuffer(data, np.uint8)
            return
        if _decoded_size(self.compression, data) != flat.nbytes:
            raise ValueError("the compressed bytes are of another size")
        try:
            _compressor(self.compression, out.dtype.itemsize).decode(data, out=flat)
        except RuntimeError as error:
            raise ValueError(str(error)) from error


def _base(name: str, stored: str, decoded: str, *arrays: ArraySpec) -> list[Codec]:
    plain = Codec(name, name, stored, decoded, arrays)
    packed = [Codec(f"{name}-{c}", name, stored, decoded, arrays, c) for c in ("blosc", "zstd")]
    return [plain, *packed]


_SCALE = ArraySpec("scale", "float32", per_feature=False)

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        *_base("fp32", "float32", "float32", ArraySpec("activations", "float32", per_feature=True)),
        # zarr-python has no bfloat16: the bits are stored as uint16, and the attributes say what they are.
        *_base("bf16", "bfloat16", "bfloat16", ArraySpec("activations", "uint16", per_feature=True)),
        *_base("fp16", "float16", "float16", ArraySpec("activations", "float16", per_feature=True)),
        *_base("fp8", "float8_e4m3fn", "bfloat16", ArraySpec("activations", "uint8", per_feature=True), _SCALE),
        *_base("int8", "int8", "bfloat16", ArraySpec("activations", "int8", per_feature=True), _SCALE),
    )
}
"""Every codec by name."""


def codec_named(name: str) -> Codec:
    """The codec of that name.

    Raises:
        UsageError: There is none.
    """
    try:
        return CODECS[name]
    except (KeyError, TypeError):
        raise UsageError(f"codec {name!r} is not known; known are {', '.join(CODECS)}") from None


def default_chunk_rows(seq_len: int, d_model: int, itemsize: int, rows: int) -> int:
    """Rows of a chunk of about 8 MiB: a power of two, at least 1 and at most `rows`.

    A pure function of its arguments, so that whoever writes a boundary again chunks it the same way.

    Args:
        seq_len: Positions of a row.
        d_model: Features of a position.
        itemsize: Bytes of a stored element.
        rows: Rows of the boundary.
    """
    fitting = max(1, CHUNK_BYTES // max(1, seq_len * d_model * itemsize))
    return max(1, min(rows, 1 << (fitting.bit_length() - 1)))


def _encode_numpy(x: Array, base: str) -> Array:
    if base == "fp32":
        return np.ascontiguousarray(x, "<f4")
    if base == "fp16":
        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(x, "<f2")
        if half is not x and bool((np.isinf(half) & np.isfinite(x)).any()):
            raise _too_large()
        return half
    bits = np.ascontiguousarray(x, "<f4").view(np.uint32)
    # Round to nearest, ties to even, as torch does; a NaN must not round to infinity.
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype("<u2")
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        rounded[nan] = 0x7FC0
    return rounded


def _encode_scaled(x: torch.Tensor | Array, base: str) -> list[Array]:
    import torch

    y = torch.from_numpy(np.ascontiguousarray(x, np.float32)) if isinstance(x, np.ndarray) else x.detach()
    y = y.to(device="cpu", dtype=torch.float32)
    largest = y.abs().amax(dim=-1)
    if not bool(largest.isfinite().all()):
        raise UsageError(
            f"codec {base} cannot store numbers that are not finite", hint="the activations diverged; bf16 stores them"
        )
    scale = largest / (_FP8_MAX if base == "fp8" else _INT8_MAX)
    # A position of zeros, or one so small that its scale underflows, is stored as zeros.
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(-1)
    q = y / divisor
    if base == "fp8":
        bits = q.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        bits = q.round().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8)
    return [bits.contiguous().numpy(), scale.contiguous().numpy()]


def decode_scaled(base: str, stored: Array, scale: Array, out: torch.Tensor) -> None:
    """Write rows of `fp8` or `int8` [n, seq, d_model] times their scales [n, seq] into `out` (bfloat16)."""
    import torch

    q = torch.from_numpy(stored)
    if base == "fp8":
        q = q.view(torch.float8_e4m3fn)
    torch.mul(q.to(torch.float32), torch.from_numpy(scale).unsqueeze(-1), out=(product := torch.empty(out.shape)))
    out.copy_(product)


def _check_range(x: torch.Tensor, half: torch.Tensor) -> None:
    if x.dtype is not half.dtype and bool((half.isinf() & x.isfinite().to(half.device)).any()):
        raise _too_large()


def _too_large() -> UsageError:
    return UsageError(
        "codec fp16 cannot store numbers beyond 65504", hint="use bf16, which has float32's range (store.codec: bf16)"
    )


def _compressor(compression: Compression, itemsize: int) -> Any:
    if compression == "blosc":
        from numcodecs.blosc import BITSHUFFLE, Blosc

        return Blosc(cname="zstd", clevel=5, shuffle=BITSHUFFLE, blocksize=0, typesize=itemsize)
    from numcodecs.zstd import Zstd

    return Zstd(level=3)


def _decoded_size(compression: Compression, data: bytes) -> int:
    """What a compressed buffer says its size is, read from its header before anything is decoded."""
    if compression == "blosc":
        if len(data) < 16 or int.from_bytes(data[12:16], "little") != len(data):
            raise ValueError("not a whole Blosc buffer")
        return int.from_bytes(data[4:8], "little")
    if len(data) < 6 or data[:4] != b"\x28\xb5\x2f\xfd":
        raise ValueError("not a Zstd frame")
    flag = data[4]
    single = bool(flag & 0x20)
    offset = 5 + (0 if single else 1) + (0, 1, 2, 4)[flag & 3]
    width = (1 if single else 0, 2, 4, 8)[flag >> 6]
    if width == 0 or len(data) < offset + width:
        raise ValueError("a Zstd frame without its size")
    return int.from_bytes(data[offset : offset + width], "little") + (256 if width == 2 else 0)
