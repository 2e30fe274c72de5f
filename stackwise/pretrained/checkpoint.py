"""A checkpoint: a directory with config.json and safetensors, of Hugging Face's layout or a StackWise export.

It comes from elsewhere. Everything in it is checked when it is opened, before any weight is read: files are regular,
their headers bounded, every tensor is within its file, and is one that config.json asks for, in its shape. Opening and
hashing import no torch; weights are read part by part, each tensor straight to its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise import files
from stackwise.data.preparation import Cache
from stackwise.durable import write_json
from stackwise.errors import NotFound, UsageError, line_of
from stackwise.identity import Hex, content_id, is_hex_id
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
from stackwise.pretrained.keys import as_json
from stackwise.pretrained.reading import (
    AGAIN,
    CONFIG_BYTES,
    COPY,
    FLOATS,
    FOREIGN,
    INDEX,
    PICKLES,
    SHARD,
    SINGLE,
    Reader,
    StoredTensor,
    read_header,
)
from stackwise.text import printable

if TYPE_CHECKING:
    import torch

    from stackwise.model.rack import Rack


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
        unused, wider = self._check(), self._check_dtypes()
        path = self.directory / "tokenizer.json"
        self.tokenizer_json = path if os.path.lexists(path) else None
        left_out = f"not used: {', '.join(printable(name) for name in unused[:3])}" + (", …" if len(unused) > 3 else "")
        fresh = "it has no head for masked tokens: the head starts with fresh weights"
        headless = self.description.masked_head and not self._names[HEAD]
        notes = [*([left_out] if unused else []), *([fresh] if headless else []), *([wider] if wider else [])]
        self.notes = (*self.description.notes, *notes)

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
            why = getattr(error, "message", None) or line_of(error, "it is no JSON")
            hint = COPY if path.is_symlink() else AGAIN
            raise UsageError(f"{path} cannot be read: {printable(why)}", hint=hint) from None
        if not isinstance(config, dict):
            raise UsageError(f"{path} cannot be read: it is no mapping", hint=AGAIN)
        return config

    def _family(self) -> Family:
        kind = self.raw.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            described = printable(f"{kind!r:.60}") if kind is not None else "nothing"
            raise UsageError(
                f"{self.directory / 'config.json'}: model_type is {described}, which StackWise does not know",
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
            whole = files.read_json(index)
            listed = whole.get("weight_map") if isinstance(whole, dict) else None
            if not isinstance(listed, dict) or not listed:
                raise ValueError("it has no weight_map, the table of tensors and their files")
        except FileNotFoundError:
            raise self._without_weights() from None
        except (OSError, ValueError) as error:
            raise UsageError(f"{index} cannot be read: {printable(str(error).splitlines()[0])}", hint=AGAIN) from None
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
                if name.endswith(FOREIGN):
                    return UsageError(
                        f"{self.directory / printable(name)} is no safetensors, which StackWise reads",
                        hint="get the checkpoint with its safetensors, or convert it: …save_pretrained(NEW)",
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
                    described = "nothing" if name not in listed else printable(listed[name])
                    what = f"tensor {printable(name)} is in {tensor.file}, the index says {described}"
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
        names: set[str] = set()
        for part, refs in self._names.items():
            shapes = part_shapes(self.description, part)
            for name, ref in refs.items():
                names.add(ref.name)
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
        others = [name for name in sorted(self._stored) if name not in names and not matches(ignored, name)]
        for name in others:
            if not matches(self.family.unused, name):
                shown = f"{self.directory}: tensor {printable(name)}"
                raise UsageError(f"{shown} belongs to no part of the rack that config.json describes", hint=AGAIN)
        return others

    def _check_dtypes(self) -> str | None:
        """Hold dtypes against the one that config.json says, where it says one; what is to be said of wider tensors."""
        path, names = self.directory / "config.json", {name: dtype for dtype, (name, _) in FLOATS.items()}
        stated = self.raw.get("dtype") or self.raw.get("torch_dtype") or "auto"
        stated = stated.removeprefix("torch.") if isinstance(stated, str) else stated
        if stated == "auto":
            return None
        if not isinstance(stated, str) or stated not in names:
            raise UsageError(f"{path}: dtype is {as_json(stated)}; StackWise reads {', '.join(names)}")
        if self.dtype != stated:
            raise UsageError(
                f"{path}: dtype is {stated}, and the weights in the files are {self.dtype}",
                hint=f"if the files are right, set dtype to {self.dtype} there",
            )
        wider = 0
        for ref in itertools.chain.from_iterable(refs.values() for refs in self._names.values()):
            stored, (name, bits) = self._stored[ref.name], FLOATS[self._stored[ref.name].dtype]
            if name != stated and bits <= FLOATS[names[stated]][1]:
                what = f"tensor {printable(ref.name)} is {name}, and dtype in config.json {stated}"
                raise UsageError(f"{self.directory / stored.file}: {what}", hint=AGAIN)
            wider += name != stated
        return (
            f"{wider} of its tensors are wider than {stated}, which config.json says: they are read as they are"
            if wider
            else None
        )

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
    tensors, state = checkpoint.load(part), module.state_dict()
    for name in sorted({*state, *tensors}):
        if name not in tensors or name not in state:
            what = "is missing" if name in state else "belongs to no part of the rack"
            raise UsageError(f"{checkpoint.directory}: {part}'s tensor {printable(name)} {what}", hint=AGAIN)
        if tensors[name].shape != state[name].shape:
            shapes = f"{list(tensors[name].shape)}, not {list(state[name].shape)}"
            raise UsageError(f"{checkpoint.directory}: {part}'s tensor {name} has shape {shapes}", hint=AGAIN)
    module.load_state_dict(tensors, assign=True)
