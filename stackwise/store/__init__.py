"""A disk-backed store of activations: content-addressed, crash-safe, open (Zarr v3), at the speed of the disk.

    from stackwise.store import ActivationStore

It knows no model: it holds the activations that any computation, named by an id, gave for (sample, mask) pairs.
Each name is imported when it is first asked for: looking at a store needs no numpy, and only tensors need torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stackwise.registry import CODECS as CODECS
    from stackwise.store.boundaries import Evicted as Evicted
    from stackwise.store.boundaries import Recompute as Recompute
    from stackwise.store.chunks import ChunkDamage as ChunkDamage
    from stackwise.store.codecs import Codec as Codec
    from stackwise.store.codecs import codec_named as codec_named
    from stackwise.store.codecs import codec_names as codec_names
    from stackwise.store.codecs import default_chunk_rows as default_chunk_rows
    from stackwise.store.dataset import BoundaryDataset as BoundaryDataset
    from stackwise.store.order import GroupedOrder as GroupedOrder
    from stackwise.store.order import Prefetcher as Prefetcher
    from stackwise.store.order import RowOrder as RowOrder
    from stackwise.store.reader import BoundaryReader as BoundaryReader
    from stackwise.store.records import BoundaryInfo as BoundaryInfo
    from stackwise.store.records import BoundarySpec as BoundarySpec
    from stackwise.store.records import boundary_id_of as boundary_id_of
    from stackwise.store.repair import repair_store as repair_store
    from stackwise.store.reshard import Reshard as Reshard
    from stackwise.store.reshard import complete as complete
    from stackwise.store.reshard import copy_boundary as copy_boundary
    from stackwise.store.reshard import nearest as nearest
    from stackwise.store.reshard import sibling_stores as sibling_stores
    from stackwise.store.reshard import spec_of as spec_of
    from stackwise.store.rows import Rowset as Rowset
    from stackwise.store.rows import rowset_id_of as rowset_id_of
    from stackwise.store.stages import CommittedStage as CommittedStage
    from stackwise.store.stages import PartFile as PartFile
    from stackwise.store.store import ActivationStore as ActivationStore
    from stackwise.store.writer import BoundaryWriter as BoundaryWriter

_HOMES = {
    "stackwise.registry": ["CODECS"],
    "stackwise.store.boundaries": ["Evicted", "Recompute"],
    "stackwise.store.chunks": ["ChunkDamage"],
    "stackwise.store.codecs": ["Codec", "codec_named", "codec_names", "default_chunk_rows"],
    "stackwise.store.dataset": ["BoundaryDataset"],
    "stackwise.store.order": ["GroupedOrder", "Prefetcher", "RowOrder"],
    "stackwise.store.reader": ["BoundaryReader"],
    "stackwise.store.records": ["BoundaryInfo", "BoundarySpec", "boundary_id_of"],
    "stackwise.store.repair": ["repair_store"],
    "stackwise.store.reshard": ["Reshard", "complete", "copy_boundary", "nearest", "sibling_stores", "spec_of"],
    "stackwise.store.rows": ["Rowset", "rowset_id_of"],
    "stackwise.store.stages": ["CommittedStage", "PartFile"],
    "stackwise.store.store": ["ActivationStore"],
    "stackwise.store.writer": ["BoundaryWriter"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
