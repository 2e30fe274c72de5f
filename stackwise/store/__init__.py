"""A disk-backed store of activations: content-addressed, crash-safe, open (Zarr v3), at the speed of the disk.

    from stackwise.store import ActivationStore

It knows no model: it holds the activations that any computation, named by an id, gave for (sample, mask) pairs.
Nothing here imports torch until a tensor is handed in or out.
"""

from stackwise.store.chunks import ChunkDamage
from stackwise.store.codecs import CODECS, Codec, default_chunk_rows
from stackwise.store.order import RowOrder
from stackwise.store.prefetch import Prefetcher
from stackwise.store.reader import BoundaryReader
from stackwise.store.recompute import Evicted
from stackwise.store.records import BoundaryInfo, boundary_id_of
from stackwise.store.repair import Recompute, repair_store
from stackwise.store.rowset import Rowset, rowset_id_of
from stackwise.store.stages import CommittedStage, PartFile
from stackwise.store.store import ActivationStore
from stackwise.store.writer import BoundaryWriter

__all__ = [
    "CODECS",
    "ActivationStore",
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
    "default_chunk_rows",
    "repair_store",
    "rowset_id_of",
]
