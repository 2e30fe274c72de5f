"""How a row of activations becomes bytes, chosen for each boundary and part of its id.

A codec is a number format and, optionally, one of Zarr's own compressors over it:

    fp32, bf16, fp16    the number as it is
    fp8, int8           e4m3 or 8-bit integers, with a float32 scale for each position of each row
    …-blosc, …-zstd     the same bytes, compressed losslessly (Blosc with bitshuffle over Zstd; Zstd)

Encoding is a pure function of one row, so a row never depends on its neighbours.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from stackwise.errors import UsageError
from stackwise.registry import CODECS

if TYPE_CHECKING:  # numpy and torch are imported where rows are encoded: looking at a store needs neither
    import numpy as np
    import numpy.typing as npt
    import torch

    Array = npt.NDArray[Any]

COMPRESSIONS = ("none", "blosc", "zstd")
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
        import numpy as np

        return np.dtype(self.data_type).newbyteorder("<")

    def row_shape(self, seq_len: int, d_model: int) -> tuple[int, ...]:
        """Shape of one row."""
        return (seq_len, d_model) if self.per_feature else (seq_len,)

    def row_bytes(self, seq_len: int, d_model: int) -> int:
        """Bytes of one row, uncompressed."""
        return math.prod(self.row_shape(seq_len, d_model)) * self.numpy.itemsize


def _arrays(data_type: str, *, scaled: bool = False) -> tuple[ArraySpec, ...]:
    numbers = ArraySpec("activations", data_type, per_feature=True)
    return (numbers, ArraySpec("scale", "float32", per_feature=False)) if scaled else (numbers,)


class Codec(abc.ABC):
    """One number format, with or without a compressor; subclasses say what they store, and how.

    One from outside the package is registered in a file of its own, and is then a name for `store.codec` like any
    other, with and without a compressor; its code is part of the ids of what is stored with it:

        @CODECS.register("int4")
        class Int4(Codec): ...

    Args:
        compression: The compressor over each chunk's bytes, one of `COMPRESSIONS`.
    """

    stored: ClassVar[str]
    """The element type that the bits of the `activations` array are ("bfloat16")."""
    decoded: ClassVar[str]
    """The torch dtype that reading gives."""
    arrays: ClassVar[tuple[ArraySpec, ...]]
    """`activations`, and what decoding needs beside it, such as `scale`."""
    direct: ClassVar[bool] = False
    """Whether a stored row's bytes are those of the decoded tensor: then rows are read straight into their place."""

    def __init_subclass__(cls) -> None:
        """A format that is `direct` is never asked to decode, so it need not say how."""
        if cls.direct:
            cls.decode = _copy  # type: ignore[method-assign, assignment]

    def __init__(self, compression: str = "none") -> None:
        self.compression = compression

    @property
    def base(self) -> str:
        """The name of the number format in `CODECS`."""
        return CODECS.name_of(type(self))

    @property
    def name(self) -> str:
        """As configurations and records call it."""
        return self.base if self.compression == "none" else f"{self.base}-{self.compression}"

    @property
    def specification(self) -> dict[str, str]:
        """What of it shapes a result: the number format, and the code of one from outside. Compressors do not."""
        code = CODECS.code(self.base)
        return {"codec": self.base} | ({} if code is None else {"codec_code": code})

    @property
    def lossless(self) -> bool:
        """Whether a tensor of the decoded dtype comes back bit for bit."""
        return self.direct

    @property
    def decoded_itemsize(self) -> int:
        """Bytes of an element after reading."""
        return 4 if self.decoded == "float32" else 2

    def row_bytes(self, seq_len: int, d_model: int) -> int:
        """Bytes of a stored row, before compression."""
        return sum(spec.row_bytes(seq_len, d_model) for spec in self.arrays)

    @abc.abstractmethod
    def encode(self, x: torch.Tensor | Array) -> list[Array]:
        """The stored arrays of rows `x` [n, seq, d_model], C-contiguous and little-endian, each row by itself.

        Raises:
            UsageError: A number has no place in the format: not finite with a scale, or too large for fp16.
        """

    @abc.abstractmethod
    def decode(self, stored: list[Array], out: torch.Tensor) -> None:
        """Undo `encode` into `out` [n, seq, d_model] of the decoded dtype; asked only where not `direct`."""

    def round_trip(self, x: torch.Tensor) -> torch.Tensor:
        """What reading gives of rows [n, seq, d_model] that were written, without a disk between.

        Returns:
            A tensor of the decoded dtype: on the device of `x` where the codec is `direct`, else on the CPU.
        """
        import torch

        decoded: torch.dtype = getattr(torch, self.decoded)
        if self.direct:
            y = x.detach().to(decoded)
            self.check(x, y)
            return y
        out = torch.empty(x.shape, dtype=decoded)
        self.decode(self.encode(x), out)
        return out

    def check(self, x: torch.Tensor, y: torch.Tensor) -> None:  # noqa: B027  # most formats hold every number
        """Raise `UsageError` where numbers of `x` have no place in `y`, the same in the decoded dtype."""

    def compress(self, data: Array) -> Any:
        """The bytes of one whole chunk of one array, as its file has them."""
        import numpy as np

        return _compressor(self.compression, data.dtype.itemsize).encode(np.ascontiguousarray(data))

    def decompress(self, data: bytes, out: Array) -> None:
        """Undo `compress` into `out`, whose size is known beforehand: no file decides how much memory is taken.

        Raises:
            ValueError: The bytes are not of that size.
        """
        if _decoded_size(self.compression, data) != out.nbytes:
            raise ValueError("the compressed bytes are of another size")
        try:
            _compressor(self.compression, out.dtype.itemsize).decode(data, out=out.reshape(-1).view("u1"))
        except RuntimeError as error:
            raise ValueError(str(error)) from error


def _copy(codec: Codec, stored: list[Array], out: torch.Tensor) -> None:
    import torch

    out.copy_(torch.from_numpy(stored[0]).view(out.dtype))


class _Plain(Codec):
    """Numbers as they are, in a narrower or equal type."""

    direct = True

    def encode(self, x: torch.Tensor | Array) -> list[Array]:
        import numpy as np

        if isinstance(x, np.ndarray):  # without torch: who writes numpy arrays need not wait for its import
            return [self._narrowed(x)]
        import torch

        y = x.detach().to(device="cpu", dtype=getattr(torch, self.decoded)).contiguous()
        self.check(x, y)
        return [y.view(torch.uint16).numpy() if y.dtype is torch.bfloat16 else y.numpy()]

    @abc.abstractmethod
    def _narrowed(self, x: Array) -> Array: ...


class FP32(_Plain):
    """float32."""

    stored = decoded = "float32"
    arrays = _arrays("float32")

    def _narrowed(self, x: Array) -> Array:
        import numpy as np

        return np.ascontiguousarray(x, "<f4")


class BF16(_Plain):
    """bfloat16. zarr-python has none: the bits are stored as uint16, and the attributes say what they are."""

    stored = decoded = "bfloat16"
    arrays = _arrays("uint16")

    def _narrowed(self, x: Array) -> Array:
        import numpy as np

        bits = np.ascontiguousarray(x, "<f4").view(np.uint32)
        # Round to nearest, ties to even, as torch does; a NaN must not round to infinity.
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = ((bits + (np.uint32(0x7FFF) + odd)) >> np.uint32(16)).astype("<u2")
        nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        if nan.any():
            rounded[nan] = 0x7FC0
        return rounded


class FP16(_Plain):
    """float16; refuses what is beyond 65504."""

    stored = decoded = "float16"
    arrays = _arrays("float16")

    def _narrowed(self, x: Array) -> Array:
        import numpy as np

        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(x, "<f2")
        if half is not x and bool((np.isinf(half) & np.isfinite(x)).any()):
            raise self._too_large()
        return half

    def check(self, x: torch.Tensor, y: torch.Tensor) -> None:
        if x.dtype is not y.dtype and bool((y.isinf() & x.isfinite().to(y.device)).any()):
            raise self._too_large()

    def _too_large(self) -> UsageError:
        return UsageError(
            "codec fp16 cannot store numbers beyond 65504",
            hint="use bf16, which has float32's range (store.codec: bf16)",
        )


class _Scaled(Codec):
    """8 bits a number, with a float32 scale for each position of each row."""

    decoded = "bfloat16"
    largest: ClassVar[float]

    def encode(self, x: torch.Tensor | Array) -> list[Array]:
        import numpy as np
        import torch

        y = torch.from_numpy(np.ascontiguousarray(x, np.float32)) if isinstance(x, np.ndarray) else x.detach()
        y = y.to(device="cpu", dtype=torch.float32)
        largest = y.abs().amax(dim=-1)
        if not bool(largest.isfinite().all()):
            raise UsageError(
                f"codec {self.base} cannot store numbers that are not finite",
                hint="the activations diverged; bf16 stores them",
            )
        scale = largest / self.largest
        # A position of zeros, or one so small that its scale underflows, is stored as zeros.
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(-1)
        return [self._quantized(y / divisor).contiguous().numpy(), scale.contiguous().numpy()]

    def decode(self, stored: list[Array], out: torch.Tensor) -> None:
        import torch

        q, scale = self._numbers(torch.from_numpy(stored[0])), torch.from_numpy(stored[1]).unsqueeze(-1)
        torch.mul(q.to(torch.float32), scale, out=(product := torch.empty(out.shape)))
        out.copy_(product)

    @abc.abstractmethod
    def _quantized(self, q: torch.Tensor) -> torch.Tensor: ...

    def _numbers(self, bits: torch.Tensor) -> torch.Tensor:
        return bits


class FP8(_Scaled):
    """e4m3."""

    stored, largest = "float8_e4m3fn", 448.0
    arrays = _arrays("uint8", scaled=True)

    def _quantized(self, q: torch.Tensor) -> torch.Tensor:
        import torch

        return q.clamp(-self.largest, self.largest).to(torch.float8_e4m3fn).view(torch.uint8)

    def _numbers(self, bits: torch.Tensor) -> torch.Tensor:
        import torch

        return bits.view(torch.float8_e4m3fn)


class INT8(_Scaled):
    """8-bit integers."""

    stored, largest = "int8", 127.0
    arrays = _arrays("int8", scaled=True)

    def _quantized(self, q: torch.Tensor) -> torch.Tensor:
        import torch

        return q.round().clamp(-self.largest, self.largest).to(torch.int8)


_made: dict[str, Codec] = {}


def codec_named(name: str) -> Codec:
    """The codec of that name: one of `CODECS`, or `<one of them>-blosc` or `-zstd`.

    Raises:
        UsageError: There is none.
    """
    if not isinstance(name, str):
        raise UsageError(f"{str(name)[:40]!r} is no codec")
    if name not in _made:
        base, dash, compression = name.partition("-")
        if base not in CODECS or (dash and compression not in COMPRESSIONS[1:]):
            raise UsageError(f"codec {name[:40]!r} is not known; known are {', '.join(codec_names())}")
        _made[name] = CODECS[base](compression or "none")
    return _made[name]


def codec_names() -> list[str]:
    """The names of all codecs."""
    return [base if c == "none" else f"{base}-{c}" for base in CODECS.names() for c in COMPRESSIONS]


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


def _compressor(compression: str, itemsize: int) -> Any:
    if compression == "blosc":
        from numcodecs.blosc import BITSHUFFLE, Blosc

        return Blosc(cname="zstd", clevel=5, shuffle=BITSHUFFLE, blocksize=0, typesize=itemsize)
    from numcodecs.zstd import Zstd

    return Zstd(level=3)


def _decoded_size(compression: str, data: bytes) -> int:
    """What a compressed buffer says its size is, read from its header before anything is decoded."""
    if compression == "blosc":
        if len(data) < 16 or int.from_bytes(data[12:16], "little") != len(data):
            raise ValueError("not a whole Blosc buffer")
        return int.from_bytes(data[4:8], "little")
    if len(data) < 6 or data[:4] != b"\x28\xb5\x2f\xfd":
        raise ValueError("not a Zstd frame")
    # RFC 8878, 3.1.1.1: the descriptor's bits say how wide the fields before the content's size are, and that itself.
    flag = data[4]
    single = bool(flag & 0x20)
    offset = 5 + (0 if single else 1) + (0, 1, 2, 4)[flag & 3]
    width = (1 if single else 0, 2, 4, 8)[flag >> 6]
    if width == 0 or len(data) < offset + width:
        raise ValueError("a Zstd frame without its size")
    return int.from_bytes(data[offset : offset + width], "little") + (256 if width == 2 else 0)
