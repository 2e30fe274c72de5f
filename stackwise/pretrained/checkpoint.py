"""A checkpoint: a directory with config.json and safetensors, of Hugging Face's layout or a StackWise export.

It comes from elsewhere. Everything in it is checked when it is opened, before any weight is read: files are regular,
their headers bounded, every tensor is within its file, and is one that config.json asks for, in its shape. Opening and
hashing import no torch; weights are read part by part, each tensor straight to its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stackwise import files
from stackwise.data.preparation import Cache
from stackwise.durable import write_json
from stackwise.errors import NotFound, UsageError
from stackwise.identity import Hex, content_id, digest, digest_of_pieces, is_hex_id
from stackwise.pretrained.families import (
    BLOCK,
    FAMILIES,
    FRONT,
    HEAD,
    Family,
    TensorRef,
    matches,
    part_shapes,
    read_description,
    stored_shape,
)
from stackwise.text import printable

if TYPE_CHECKING:
    import torch

    from stackwise.model.rack import Rack

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
"""Names of weight files that an index may have: of the directory itself, and of nothing else."""

CONFIG_BYTES = 4 << 20
HEADER_BYTES = 32 << 20
"""Most bytes of a weight file's header: some 300,000 tensors."""

BAND_BYTES = 1 << 20
"""Bytes that are read or written at once where a tensor is turned."""
CHECKED = 1 << 16
"""Numbers that are looked at together: a few hundred kB beside the tensor."""

EXPONENTS = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}
"""The bits that are all set in nan and in infinity alone."""

FLOATS = {"F64": ("float64", "<u8"), "F32": ("float32", "<u4"), "F16": ("float16", "<u2"), "BF16": ("bfloat16", "<u2")}
"""The dtypes that weights may have, as safetensors, torch and (in bits alone) numpy call them."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

AGAIN = "get the checkpoint again"
COPY = "copy it with what its links lead to: cp -rL DIR NEW"
"""What to do with a directory of links, as Hugging Face's cache is."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, as the file's header says: its first byte is the `begin`th of the file."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * np.dtype(FLOATS[self.dtype][1]).itemsize if self.dtype in FLOATS else 0


def read_metadata(path: Path) -> dict[str, Any]:
    """What a safetensors file says of itself beside its tensors; empty where it says nothing.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no safetensors file.
    """
    with os.fdopen(files.open_regular(path), "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        table = files.parse_json(file.read(length)) if length <= HEADER_BYTES else {}
    said = table.get("__metadata__") if isinstance(table, dict) else None
    return said if isinstance(said, dict) else {}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name, whatever their dtype; the values are not read.

    Raises:
        UsageError: The file is missing, cut off, no regular file, or no safetensors.
    """

    def broken(why: str) -> UsageError:
        return UsageError(f"{path} cannot be read: {printable(why)}", hint=COPY if path.is_symlink() else AGAIN)

    try:
        with os.fdopen(files.open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise broken("it is cut off, or no safetensors file")
            if length > HEADER_BYTES:
                raise broken(f"its header is said to have {length} bytes")
            table = files.parse_json(file.read(length))
    except FileNotFoundError:
        raise UsageError(f"{path} is missing", hint=AGAIN) from None
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise broken((str(error).splitlines() or [type(error).__name__])[0]) from None
    if not isinstance(table, dict):
        raise broken("its header is no table of tensors")
    table.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    ranges: list[tuple[int, int]] = []
    for name, entry in table.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (KeyError, TypeError, ValueError):
            raise broken(f"its header says of {name} what no tensor can be") from None
        if not isinstance(dtype, str) or len(shape) > 8 or any(type(n) is not int or n < 0 for n in numbers):
            raise broken(f"its header says of {name} what no tensor can be")
        tensor = StoredTensor(path.name, tuple(shape), dtype, 8 + length + begin)
        if dtype in FLOATS and end - begin != tensor.nbytes:
            raise broken(f"{name} takes other bytes than its shape and dtype say")
        if begin > end or end > size - 8 - length:
            raise broken("it is cut off")
        tensors[name] = tensor
        ranges.append((begin, end))
    # As the format has it: nothing between tensors, before or behind them, and no byte of two.
    ranges.sort()
    if any(end != begin for (_, end), (begin, _) in itertools.pairwise([(0, 0), *ranges, (size - 8 - length, 0)])):
        raise broken("its tensors do not lie one behind the other")
    return tensors


class Reader:
    """Reads tensors of a directory's files, each straight into memory of its own.

    Args:
        directory: Where the files are.
        tables: The headers of files that were read already.
    """

    def __init__(self, directory: Path, tables: Mapping[str, dict[str, StoredTensor]] | None = None) -> None:
        self._directory = directory
        self._tables = dict(tables or {})

    def stored(self, ref: TensorRef) -> StoredTensor:
        """What the file's header says of a tensor.

        Raises:
            UsageError: There is none, or its file cannot be read.
        """
        if not SHARD.fullmatch(ref.file):
            raise UsageError(f"{printable(ref.file)!r:.80} is no file of weights", hint=AGAIN)
        if ref.file not in self._tables:
            self._tables[ref.file] = read_header(self._directory / ref.file)
        if ref.name not in self._tables[ref.file]:
            raise UsageError(f"{self._directory / ref.file} has no tensor {printable(ref.name)}", hint=AGAIN)
        return self._tables[ref.file][ref.name]

    def shape(self, ref: TensorRef) -> tuple[int, ...]:
        """The shape of a tensor, as its part has it."""
        shape = self.stored(ref).shape
        shape = shape[::-1] if ref.transpose else shape
        return shape if ref.rows is None else (ref.rows[1] - ref.rows[0], *shape[1:])

    def bands(self, ref: TensorRef) -> Iterator[bytes]:
        """The bytes of a tensor that is not turned, piece by piece."""
        stored, path = self.stored(ref), self._directory / ref.file
        first, last = self._range(ref)
        with io.FileIO(files.open_regular(path), "rb") as file:
            file.seek(stored.begin + first)
            while first < last:
                if not (piece := file.read(min(BAND_BYTES, last - first))):
                    raise UsageError(f"{path} cannot be read: it is cut off", hint=AGAIN)
                first += len(piece)
                self._check_finite(ref, np.frombuffer(piece, FLOATS[stored.dtype][1]))
                yield piece

    def _range(self, ref: TensorRef) -> tuple[int, int]:
        """First and last byte of a tensor that is not turned, counted from that of the file's tensor."""
        stored = self.stored(ref)
        if ref.rows is None:
            return 0, stored.nbytes
        row = stored.nbytes // max(1, stored.shape[0])
        return ref.rows[0] * row, ref.rows[1] * row

    def read(self, ref: TensorRef) -> np.ndarray[Any, Any]:
        """A tensor as its part has it, in unsigned integers of its dtype's width.

        Raises:
            UsageError: It is not in its file, or the file is cut off.
        """
        stored, shape = self.stored(ref), self.shape(ref)
        values = _empty(shape, FLOATS[stored.dtype][1])
        path = self._directory / ref.file
        with io.FileIO(files.open_regular(path), "rb") as file:
            if not ref.transpose:
                file.seek(stored.begin + self._range(ref)[0])
                _fill(file, values, path)
                self._check_finite(ref, values.reshape(-1))
                return values
            # Turned in bands of the file's rows: never is the whole of it in memory beside the result.
            rows, columns = stored.shape
            first, last = ref.rows or (0, columns)
            step = max(1, BAND_BYTES // max(1, columns * values.itemsize))
            file.seek(stored.begin)
            band = _empty((min(step, rows), columns), values.dtype.str)
            for start in range(0, rows, step):
                band = band[: rows - start]
                _fill(file, band, path)
                values[:, start : start + len(band)] = band[:, first:last].T
        self._check_finite(ref, values.reshape(-1))
        return values

    def _check_finite(self, ref: TensorRef, values_N: np.ndarray[Any, Any]) -> None:
        """Refuse weights that are no numbers, a slice at a time: the slice stays in the processor's cache.

        Raises:
            UsageError: There is one.
        """
        exponent = values_N.dtype.type(EXPONENTS[self.stored(ref).dtype])
        for first in range(0, len(values_N), CHECKED):
            if (values_N[first : first + CHECKED] & exponent).max(initial=0) == exponent:
                raise UsageError(
                    f"{self._directory / ref.file}: tensor {printable(ref.name)} has values that are nan or infinite",
                    hint=f"{AGAIN}; no training and no loss can come of it",
                )

    def digest(self, ref: TensorRef) -> Hex:
        """The digest of a tensor's bytes, as its part has it."""
        if ref.transpose:
            return digest(self.read(ref).reshape(-1).view(np.uint8))
        return digest_of_pieces(self.bands(ref))

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        """The same as a tensor of torch, in the file's dtype."""
        import torch

        values, name = self.read(ref), FLOATS[self.stored(ref).dtype][0]
        signed: torch.Tensor = torch.from_numpy(values.view(values.dtype.str.replace("u", "i")))
        return signed.view(getattr(torch, name))

    def converted(self, ref: TensorRef, dtype: torch.dtype | None, rows: int | None) -> tuple[torch.Tensor, Hex]:
        """The same in another dtype, and the digest of its bytes in the file: no more of them is in memory than a band.

        Args:
            rows: Rows that it is to have at least; those that it lacks are the mean of the others.
        """
        import torch

        shape = self.shape(ref)
        count, narrow = math.prod(shape), getattr(torch, FLOATS[self.stored(ref).dtype][0])
        result = torch.empty((max(rows or 0, shape[0]), *shape[1:]) if shape else (), dtype=dtype or narrow)
        if ref.transpose:  # its bytes come in another order
            tensor = self.tensor(ref)
            result.view(-1)[:count].copy_(tensor.view(-1))
            hashed = digest(tensor.view(-1).view(torch.uint8).numpy())
        else:
            flat, first = result.view(-1), 0

            def pieces() -> Iterator[bytes]:
                nonlocal first
                for piece in self.bands(ref):
                    values = torch.frombuffer(bytearray(piece), dtype=narrow)
                    flat[first : first + len(values)].copy_(values)
                    first += len(values)
                    yield piece

            hashed = digest_of_pieces(pieces())
        if shape and len(result) > shape[0]:
            _complete(result, shape[0], narrow)
        return result, hashed


def _complete(result_VX: torch.Tensor, known: int, narrow: torch.dtype) -> None:
    """Let the rows from `known` on be the mean of those before, as the file's dtype has it."""
    import torch

    total_X = torch.zeros(result_VX.shape[1:], dtype=torch.float64)
    for first in range(0, known, 1 << 12):  # never the whole of it in float64
        total_X += result_VX[first : min(known, first + (1 << 12))].sum(0, dtype=torch.float64)
    result_VX[known:] = (total_X / known).to(narrow).to(result_VX.dtype)


def _empty(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """Memory of its own, which goes back to the system when it is freed: malloc may keep it."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if nbytes < 1 << 20:
        return np.empty(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype).reshape(shape)


def _fill(file: io.FileIO, values: np.ndarray[Any, Any], path: Path) -> None:
    view = values.reshape(-1).view(np.uint8).data
    while view.nbytes:
        count = file.readinto(view)
        if not count:
            raise UsageError(f"{path} cannot be read: it is cut off", hint=AGAIN)
        view = view[count:]


def read_part(
    directory: Path | str, refs: Mapping[str, TensorRef], dtype: torch.dtype | None, sizes: Mapping[str, int]
) -> tuple[dict[str, torch.Tensor], Hex]:
    """The tensors of a part in a dtype, and the part's digest in that of its files.

    They are read one after another, each straight to where it stays: beside the part as it trains, there is no more in
    memory than a band of one tensor (of one that is turned, as GPT-2's are, the tensor).

    Args:
        directory: The checkpoint.
        refs: For each tensor of the part where it is (`Checkpoint.names`).
        dtype: What they are converted to; None: each stays in its file's.
        sizes: For tensors with a row for each id, how many rows they are to have: see `Reader.converted`.

    Raises:
        UsageError: A file is missing, cut off, lacks a tensor, or has values that are no numbers.
    """
    reader, tensors, entries = Reader(Path(directory)), {}, []
    for name, ref in sorted(refs.items()):
        tensors[name], hashed = reader.converted(ref, dtype, sizes.get(name))
        entries.append([name, FLOATS[reader.stored(ref).dtype][0], list(reader.shape(ref)), hashed])
    return tensors, content_id("part", entries)


class Checkpoint:
    """A directory with a pretrained model, checked when it is opened.

    Args:
        directory: The directory.
        cache_dir: Where digests are remembered, as `data.cache_dir`; None: the user's cache directory.

    Attributes:
        description: What it is, in settings of StackWise.
        family: Its family.
        tokenizer_json: Its tokenizer, where it has one.
        notes: What is to be said of it, one line each.

    Raises:
        NotFound: There is no checkpoint.
        UsageError: It is damaged, contradicts itself, or asks for what StackWise cannot do exactly.
    """

    def __init__(self, directory: Path | str, cache_dir: str | None = None) -> None:
        self.directory = Path(directory)
        self._cache_dir = cache_dir
        self.raw = self._read_config()
        """The content of config.json."""
        self.family = self._family()
        with self._explained():
            self.description = read_description(self.family, self.raw)
        names, listed = self._files()
        self._tables = {name: read_header(self.directory / name) for name in names}
        self._reader = Reader(self.directory, self._tables)
        self._stored = self._merged(listed)
        self.base = self.family.base
        """What names in its files begin with."""
        if not any(name.startswith(self.base) for name in self._stored):
            self.base = ""  # the bare model
        self._names = {part: self._found(part) for part in self.description.parts}
        unused = self._check()
        path = self.directory / "tokenizer.json"
        self.tokenizer_json = path if os.path.lexists(path) else None
        left_out = f"not used: {', '.join(printable(name) for name in unused[:3])}" + (", …" if len(unused) > 3 else "")
        fresh = "it has no head for masked tokens: the head starts with fresh weights"
        headless = self.description.masked_head and not self._names[HEAD]
        self.notes = (*self.description.notes, *([left_out] if unused else []), *([fresh] if headless else []))

    @property
    def parts(self) -> list[str]:
        """The names of all parts, lowest first."""
        return self.description.parts

    @property
    def dtype(self) -> str:
        """The dtype of the embedding, as torch calls it."""
        return FLOATS[self._reader.stored(self._names[FRONT]["embedding.weight"]).dtype][0]

    def names(self, part: str) -> dict[str, TensorRef]:
        """Where each tensor of a part is; empty for a head that the checkpoint has not.

        Args:
            part: "front", "block.K" or "head".
        """
        return dict(self._names[part])

    def load(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of a part, as its module names them, in the dtype of the file; no other part is in memory.

        Raises:
            UsageError: A file was cut off since the checkpoint was opened.
        """
        return {name: self._reader.tensor(ref) for name, ref in self._names[part].items()}

    def digest(self, part: str) -> Hex:
        """What `model.part_digest` says of `load(part)`: of each part hashed once, and remembered.

        What is remembered holds as long as size, time and inode of all files do.
        """
        memory = self._memory
        if part not in memory:
            entries = []
            for name, ref in sorted(self._names[part].items()):
                dtype, shape = FLOATS[self._reader.stored(ref).dtype][0], list(self._reader.shape(ref))
                entries.append([name, dtype, shape, self._reader.digest(ref)])
            memory[part] = content_id("part", entries)
            if (path := self._memory_path) is not None:
                with contextlib.suppress(OSError):
                    files.make_directory(path.parent)
                    write_json(path, memory)
        return memory[part]

    @functools.cached_property
    def _memory_path(self) -> Path | None:
        root = Cache(self._cache_dir, optional=True).root
        stats = [(self.directory / name).stat() for name in sorted(self._tables)]
        about = [[s.st_size, s.st_mtime_ns, s.st_ino, s.st_dev] for s in stats]
        names = {part: {n: list(dataclasses.astuple(r)) for n, r in refs.items()} for part, refs in self._names.items()}
        key = content_id("checkpoint", [sorted(self._tables), about, names])
        return None if root is None else root / "checkpoints" / f"{key}.json"

    @functools.cached_property
    def _memory(self) -> dict[str, Hex]:
        """Digests of parts, as far as they are known."""
        try:
            kept = files.read_json(self._memory_path) if self._memory_path is not None else {}
        except (OSError, ValueError):
            kept = {}
        alike = isinstance(kept, dict) and all(part in self._names and is_hex_id(hex) for part, hex in kept.items())
        return kept if alike else {}

    def _read_config(self) -> dict[str, Any]:
        path = self.directory / "config.json"
        try:
            config = files.read_json(path, limit=CONFIG_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            what = "there is no config.json" if self.directory.is_dir() else "there is no such directory"
            raise NotFound(f"{printable(str(self.directory))} holds no checkpoint: {what}") from None
        except (OSError, ValueError) as error:
            why = getattr(error, "message", None) or (str(error).splitlines() or ["it is no JSON"])[0]
            hint = COPY if path.is_symlink() else AGAIN
            raise UsageError(f"{path} cannot be read: {printable(why)}", hint=hint) from None
        if not isinstance(config, dict):
            raise UsageError(f"{path} cannot be read: it is no mapping", hint=AGAIN)
        return config

    def _family(self) -> Family:
        kind = self.raw.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            said = printable(f"{kind!r:.60}") if kind is not None else "nothing"
            raise UsageError(
                f"{self.directory / 'config.json'}: model_type is {said}, which StackWise does not know",
                hint=f"it reads {', '.join(FAMILIES.names())}",
            )
        return FAMILIES[kind]()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say of which file a fault of config.json is."""
        try:
            yield
        except UsageError as error:
            raise UsageError(f"{self.directory / 'config.json'}: {error.message}", hint=error.hint) from None

    def _files(self) -> tuple[list[str], dict[str, str]]:
        """The files of weights, and for each tensor its file where an index says so."""
        index = self.directory / INDEX
        if os.path.lexists(self.directory / SINGLE):
            return [SINGLE], {}
        try:
            listed = files.read_json(index)["weight_map"]
            if not isinstance(listed, dict) or not listed:
                raise ValueError("its weight_map is no table of tensors")
        except FileNotFoundError:
            raise self._without_weights() from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"it has no {error.args[0]}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise UsageError(f"{index} cannot be read: {printable(why)}", hint=AGAIN) from None
        for name in listed.values():
            # A name is never joined to the directory unless it is a plain one: it could lead out of it.
            if not isinstance(name, str) or not SHARD.fullmatch(name):
                raise UsageError(f"{index} names {name!r:.80}, which is no file of weights", hint=AGAIN)
        return sorted(set(listed.values())), listed

    def _without_weights(self) -> UsageError:
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(self.directory)):
                if name.endswith(PICKLES):
                    return UsageError(
                        f"{self.directory / printable(name)} is a pickle, which runs code when it is opened",
                        hint="convert it where that does no harm: AutoModel.from_pretrained(DIR).save_pretrained(NEW)",
                    )
        return UsageError(f"{self.directory / SINGLE} is missing", hint=f"nor is there {INDEX}; {AGAIN}")

    def _merged(self, listed: Mapping[str, str]) -> dict[str, StoredTensor]:
        """All tensors by name, each in one file, that which the index says."""
        stored: dict[str, StoredTensor] = {}
        for table in self._tables.values():
            for name, tensor in table.items():
                if name in stored:
                    raise UsageError(f"{self.directory}: tensor {printable(name)} is in two files", hint=AGAIN)
                if listed and listed.get(name) != tensor.file:
                    said = "nothing" if name not in listed else printable(listed[name])
                    what = f"tensor {printable(name)} is in {tensor.file}, the index says {said}"
                    raise UsageError(f"{self.directory}: {what}", hint=AGAIN)
                stored[name] = tensor
        if missing := sorted(set(listed) - set(stored)):
            raise UsageError(f"{self.directory}: tensor {printable(missing[0])} is missing", hint=AGAIN)
        return stored

    def _found(self, part: str) -> dict[str, TensorRef]:
        """Where the tensors of a part are, whether they are there or not; of a head that is not there at all: empty."""
        refs = self.family.refs(self.description, part, self.base, self._stored)
        if part == HEAD and self.description.masked_head and not any(ref.name in self._stored for ref in refs.values()):
            return {}
        stored = {name: self._stored.get(ref.name) for name, ref in refs.items()}
        return {
            name: dataclasses.replace(ref, file="" if (tensor := stored[name]) is None else tensor.file)
            for name, ref in refs.items()
        }

    def _check(self) -> list[str]:
        """Hold the headers against config.json; the names of tensors that no part uses."""
        wanted: set[str] = set()
        for part, refs in self._names.items():
            shapes = part_shapes(self.description, part)
            for name, ref in refs.items():
                wanted.add(ref.name)
                shown = f"{self.directory}: tensor {printable(ref.name)}"
                if (tensor := self._stored.get(ref.name)) is None:
                    raise UsageError(f"{shown} is missing", hint=AGAIN)
                if tensor.dtype not in FLOATS:
                    raise UsageError(f"{shown} is {printable(tensor.dtype)}; StackWise reads {', '.join(FLOATS)}")
                if ((ref.transpose or ref.rows) and not tensor.shape) or (ref.transpose and len(tensor.shape) != 2):
                    raise UsageError(f"{shown} has shape {list(tensor.shape)}, no matrix", hint=AGAIN)
                shape = shapes.get(name)
                whole = tensor.shape if shape is None else stored_shape(shape, refs.values(), ref)
                if tensor.shape != whole:
                    raise UsageError(f"{shown} has shape {list(tensor.shape)}, not {list(whole)}", hint=AGAIN)
        self._check_tied()
        ignored = [*self.family.ignored, *self.family.tied(self.description)]
        others = [name for name in sorted(self._stored) if name not in wanted and not matches(ignored, name)]
        for name in others:
            if not matches(self.family.unused, name):
                shown = f"{self.directory}: tensor {printable(name)}"
                raise UsageError(f"{shown} belongs to no part of the rack that config.json describes", hint=AGAIN)
        return others

    def _check_tied(self) -> None:
        """A head that is tied may stand in the files once more: then it is the embedding."""
        head, embedding = self.family.task_names.get("projection"), self._names[FRONT].get("embedding.weight")
        stored = self._stored.get(head or "")
        if not self.description.config.tie_embeddings or stored is None or embedding is None:
            return
        refs = (embedding, TensorRef(stored.file, str(head)))
        if any(a != b for a, b in itertools.zip_longest(*map(self._reader.bands, refs))):
            what = f"{head} differs from the embedding, and tie_word_embeddings says that they are one"
            raise UsageError(f"{self.directory}: {what}", hint="set tie_word_embeddings to false in config.json")


def load_rack(checkpoint: Checkpoint | Path | str, device: torch.device | str = "cpu", seed: int = 0) -> Rack:
    """The whole model of a checkpoint, in the dtype of its files.

    Args:
        checkpoint: The checkpoint, or its directory.
        device: Where it goes.
        seed: Of the head, where the checkpoint has none.

    Raises:
        NotFound: There is no checkpoint.
        UsageError: See `Checkpoint`.
    """

    from stackwise.model.block import Block, Stack
    from stackwise.model.build import build_head, on_meta, rebuild_tables
    from stackwise.model.rack import Front, Rack

    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    about, config = checkpoint.description, checkpoint.description.config
    with on_meta():
        front = Front(config, about.vocab_size, about.max_seq_len)
        blocks = [Block(config.at(index)) for index in range(config.n_blocks)]
    for part, module in ((FRONT, front), *((f"{BLOCK}{index}", block) for index, block in enumerate(blocks))):
        _take(module, checkpoint, part)
        rebuild_tables(module, device)
        module.to(device)
    embedding = front.embedding.weight
    if not checkpoint.names(HEAD):
        shared = embedding if config.tie_embeddings else None
        head = build_head(config, about.vocab_size, seed, shared, device, embedding.dtype)
    else:
        with on_meta():
            head = config.head.build(config, about.vocab_size, embedding if config.tie_embeddings else None)
        _take(head, checkpoint, HEAD)
        head.to(device)
    per_stack = config.architecture.blocks_per_stack
    stacks = [Stack(blocks[i : i + per_stack], i // per_stack) for i in range(0, len(blocks), per_stack)]
    return Rack(front, stacks, head)


def _take(module: torch.nn.Module, checkpoint: Checkpoint, part: str) -> None:
    """Let a module from the meta device have its part's tensors."""
    tensors, wanted = checkpoint.load(part), module.state_dict()
    for name in sorted({*wanted, *tensors}):
        if name not in tensors or name not in wanted:
            what = "is missing" if name in wanted else "belongs to no part of the rack"
            raise UsageError(f"{checkpoint.directory}: {part}'s tensor {printable(name)} {what}", hint=AGAIN)
        if tensors[name].shape != wanted[name].shape:
            shapes = f"{list(tensors[name].shape)}, not {list(wanted[name].shape)}"
            raise UsageError(f"{checkpoint.directory}: {part}'s tensor {name} has shape {shapes}", hint=AGAIN)
    module.load_state_dict(tensors, assign=True)
