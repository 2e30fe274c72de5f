"""What trackers wrote, read from their own files."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Series = dict[str, list[tuple[int, float]]]
"""(step, value) by `stage-000/loss`, in the order written."""


def tensorboard(run: Path) -> Series:
    """Scalars of event files (TFRecord: length, its checksum, data, its checksum)."""
    from tensorboardX.crc32c import _crc32c as crc32c
    from tensorboardX.proto.event_pb2 import Event

    def checked(data: bytes, at: int) -> None:
        crc = crc32c(data)
        (stored,) = struct.unpack_from("<I", raw, at)
        assert stored == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF, f"{path}: checksum at {at}"

    found: Series = {}
    for path in sorted((run / "tensorboard").rglob("events*"), key=lambda p: p.stat().st_mtime_ns):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            (length,) = struct.unpack_from("<Q", raw, at)
            checked(raw[at : at + 8], at + 8)
            checked(raw[at + 12 : at + 12 + length], at + 12 + length)
            event = Event.FromString(raw[at + 12 : at + 12 + length])
            assert event.wall_time > 1.7e9
            at += 12 + length + 4
            for value in event.summary.value:
                where = path.parent.relative_to(run / "tensorboard")
                found.setdefault(f"{where}/{value.tag}", []).append((event.step, value.simple_value))
    return found


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of a `.wandb` file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, whole = path.read_bytes(), 7, b""
    assert raw[:4] == b":W&B"
    while at + 7 <= len(raw):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        if kind == 0:
            at += left
            continue
        whole += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def wandb(run: Path) -> tuple[set[str], dict[str, Any], Series]:
    """Ids, configuration and series of a run's offline files."""
    import json

    ids, config, found = set(), {}, {}
    series: Series = found
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for record in wandb_records(path):
            match record.WhichOneof("record_type"):
                case "run":
                    ids.add(record.run.run_id)
                    config |= {
                        item.key or "/".join(item.nested_key): json.loads(item.value_json)
                        for item in record.run.config.update
                    }
                case "history":
                    row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                    for name, value in row.items():
                        where = name.split("/")[0]
                        if f"{where}/step" in row and not name.endswith("/step"):
                            series.setdefault(name, []).append((row[f"{where}/step"], value))
    return ids, config, series


def mlflow(uri: str, run_id: str) -> tuple[Any, Series]:
    """A run, and its series."""
    import os
    import warnings

    os.environ |= {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        found = client.get_run(run_id)
        return found, {
            name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)] for name in found.data.metrics
        }
