"""A disk-backed store of activations: content-addressed, crash-safe, open (Zarr v3), at the speed of the disk.

    from stackwise.store import ActivationStore

It knows no model: it holds the activations that any computation, named by an id, gave for (sample, mask) pairs.
Nothing here imports torch until a tensor is handed in or out.
"""

from typing import TYPE_CHECKING

from stackwise.registry import CODECS
from stackwise.store.boundaries import Evicted, Recompute
from stackwise.store.chunks import ChunkDamage
from stackwise.store.codecs import Codec, codec_named, codec_names, default_chunk_rows
from stackwise.store.order import Prefetcher, RowOrder
from stackwise.store.reader import BoundaryReader
from stackwise.store.records import BoundaryInfo, boundary_id_of
from stackwise.store.rows import Rowset, rowset_id_of
from stackwise.store.stages import CommittedStage, PartFile
from stackwise.store.store import ActivationStore, repair_store
from stackwise.store.writer import BoundaryWriter

if TYPE_CHECKING:
    from stackwise.store.dataset import BoundaryDataset

__all__ = [
    "CODECS",
    "ActivationStore",
    "BoundaryDataset",
    "BoundaryInfo",
    "BoundaryReader",
    "BoundaryWriter",
    "ChunkDamage",
    "Codec",
    "CommittedStage",
    "Evicted",
    "PartFile",
    "Prefetcher",
    "Recompute",
    "RowOrder",
    "Rowset",
    "boundary_id_of",
    "codec_named",
    "codec_names",
    "default_chunk_rows",
    "repair_store",
    "rowset_id_of",
]


def __getattr__(name: str) -> object:
    if name == "BoundaryDataset":  # a torch class: the one import here that would load torch
        from stackwise.store.dataset import BoundaryDataset

        return BoundaryDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
