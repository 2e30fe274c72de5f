"""The part of `ActivationStore` that holds masks and rowsets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from stackwise.errors import NotFound
from stackwise.identity import Hex
from stackwise.store.index import Index
from stackwise.store.layout import Layout, checked_id
from stackwise.store.masks import MaskIds, Masks
from stackwise.store.rowset import Ids, Rowset, check_ids, rowset_id_of, stage_rowset
from stackwise.store.tables import Writing


class Rows:
    """Not to be made by itself."""

    path: Path
    _index: Index
    _layout: Layout
    _masks: Masks
    _rowsets: dict[Hex, Rowset]

    # Masks and rowsets

    def put_masks(self, masks: npt.NDArray[np.bool_]) -> MaskIds:
        """Store mask patterns bool [n, length]; returns their ids uint8 [n, 16]. Equal patterns are stored once.

        Raises:
            UsageError: `masks` is not a boolean matrix.
        """
        return self._masks.put(masks)

    def masks(self, mask_ids: MaskIds, seq_len: int | None = None) -> npt.NDArray[np.bool_]:
        """Patterns bool [n, length] of mask ids uint8 [n, 16]; recent ones are kept in memory.

        Raises:
            NotFound: An id is not stored here.
            UsageError: The masks differ in length, or are not of `seq_len` positions.
        """
        return self._masks.get(mask_ids, seq_len)

    def put_rowset(self, sample_ids: Ids, mask_ids: MaskIds) -> Hex:
        """Store the ordered pairs of sample ids uint8 [rows, 16] and mask ids uint8 [rows, 16]; returns its id.

        Storing the same pairs again does nothing and gives the same id.

        Raises:
            UsageError: Not such arrays, or no row.
            NotFound: A mask is not in the store (`put_masks` comes first).
        """
        samples, masks = check_ids(sample_ids, mask_ids)
        rowset_id = rowset_id_of(samples, masks)
        if self._rowset_rows(rowset_id) is not None:
            return rowset_id
        missing = self._masks.missing(masks)
        if missing:
            raise NotFound(f"{missing} of the rowset's masks are not in the store; `put_masks` stores them")
        install = stage_rowset(self._layout.rowset(rowset_id), samples, masks)

        def publish(view: Writing) -> None:
            install()
            view.put("rowsets", bytes.fromhex(rowset_id), len(samples).to_bytes(8, "little"))

        self._index.update(publish)
        return rowset_id

    def rowset(self, rowset_id: Hex) -> Rowset:
        """The rowset of that id: `.rows`, `.sample_ids`, `.mask_ids`, `.row(sample, mask)`, `.find(samples, masks)`.

        Raises:
            NotFound: It is not in the store.
            DamageError: Its file is damaged.
        """
        found = self._rowsets.get(rowset_id)
        if found is None:
            checked_id(rowset_id, "rowset")
            rows = self._rowset_rows(rowset_id)
            if rows is None:
                raise NotFound(f"rowset {rowset_id} is not in the store {self.path}")
            found = self._rowsets[rowset_id] = Rowset(rowset_id, self._layout.rowset(rowset_id), rows)
        return found

    def forget_rowset(self, rowset_id: Hex) -> None:
        """Remove a rowset from the index and from memory, not from the disk: it is about to be stored anew."""
        self._rowsets.pop(rowset_id, None)
        self._index.update(lambda view: view.delete("rowsets", bytes.fromhex(checked_id(rowset_id, "rowset"))))

    def _forget_cached(self) -> None:
        self._rowsets.clear()
        self._masks.forget()

    def _rowset_rows(self, rowset_id: Hex) -> int | None:
        with self._index.read() as view:
            raw = view.get("rowsets", bytes.fromhex(rowset_id))
        return None if raw is None else int.from_bytes(raw[:8], "little")
