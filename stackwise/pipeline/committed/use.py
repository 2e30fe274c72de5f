"""What is done with a run's committed weights: evaluated, exported, its boundaries made again bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stackwise.batch import MASKS, TOKENS, Batch
from stackwise.config import DataConfig, StackWiseConfig
from stackwise.config.loading import build
from stackwise.data import PreparedData, Split, prepare, require_samples
from stackwise.data.chat import copy_template
from stackwise.errors import NotFound, UsageError
from stackwise.evaluation import HeldOut, Measure, StageModules, evaluate
from stackwise.files import expanded
from stackwise.identity import derive_seed, generator
from stackwise.model import enter
from stackwise.pipeline.committed.figures import answer_figures, pair_figures
from stackwise.pipeline.committed.load import CommittedRack, load_model, load_rack
from stackwise.pipeline.device import resolve_device
from stackwise.pipeline.division import edges
from stackwise.pipeline.initial import Adapted, open_weights, with_checkpoint
from stackwise.pipeline.parts import load_part
from stackwise.pipeline.recipe import forward_specification, trunk_id
from stackwise.pipeline.rows import choose_samples
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.schedule import ADAPTER, HEAD, Stage
from stackwise.pretrained import Checkpoint
from stackwise.pretrained.adapters import is_adapter
from stackwise.pretrained.writing import Exported, ExportOptions, export, export_adapters, export_checkpoint
from stackwise.store import ActivationStore, BoundaryInfo, Recompute
from stackwise.training.forward import forward_rows


def held_out_samples(rack: CommittedRack, split: Split) -> np.ndarray:
    """Indices of the held-out samples that evaluation uses: at most `evaluation.samples`, drawn by the seed."""
    config = rack.config
    require_samples(split, config.training.seq_len, "held-out")
    order = generator(config.seed, "held-out").permutation(split.n_samples(config.training.seq_len))
    return np.sort(order[: config.evaluation.samples])


_OWN = {"pairs": pair_figures, "answers": answer_figures}


def evaluate_rack(
    rack: CommittedRack, split: Split, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Held-out figures of a rack and of each of its stages, in the shape of `stackwise eval --json`.

    A rack that was trained on pairs or on its own answers has `figures` by name instead, and `of` what they are.

    Args:
        progress: Called after each batch with (done, total); what it raises ends the evaluation.
    """
    if (make := _OWN.get(rack.config.objective.evaluated)) is not None:
        indices = held_out_samples(rack, split)
        figures = make(rack, split, indices, progress or (lambda done, total: None))
        sizes = {"samples": len(indices), "tokens": len(indices) * rack.config.training.seq_len, "bytes": 0}
        nothing: dict[str, Any] = {"bits_per_byte": None, "bits_per_byte_error": None, "likelihood": None}
        nothing |= {"loss": {}, "accuracy": {}, "stages": [], "baselines": {}}
        return nothing | sizes | {"of": rack.config.objective.evaluated, "figures": figures}
    bidirectional, causal = ([s for s in rack.stages if s.causal is not both] for both in (True, False))
    results = [
        _evaluated(rack, rack.exits(stages), stages, split, progress) for stages in (bidirectional, causal) if stages
    ]
    result = results[-1]
    for before in results[:-1]:  # what the rack was before it was made causal
        for group in (before, result):
            for row in group["stages"]:
                row["likelihood"] = group["likelihood"]
        result["stages"] = [*before["stages"], *result["stages"]]
    if len(result["stages"]) > 1:
        first = {key: value for key, value in result["stages"][0].items() if key != "depth"}
        result["baselines"]["first_stage"] = first
    return result


def _evaluated(
    rack: CommittedRack,
    modules: Iterator[StageModules],
    stages: Sequence[Stage],
    split: Split,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Figures of some stages that were trained with one objective; those of the last are the rack's."""
    config = rack.config
    seq_len = config.training.seq_len
    indices = held_out_samples(rack, split)
    samples = HeldOut(
        split.samples(indices, seq_len),
        split.sample_bytes(indices, seq_len),
        segments_NS=split.segments(indices, seq_len) if config.data.within_documents else None,
        targets_NS=split.targets(indices, seq_len) if "targets" in config.objective.inputs else None,
        separator_id=rack.data.tokenizer.separator_id,
        tasks_N=split.sample_tasks(seq_len)[indices] if config.model.stream.columns > 1 and split.tasks else None,
        columns={name: split.column(name, indices, seq_len) for name in config.objective.inputs},
    )
    how = Measure(
        fractions=config.evaluation.fractions,
        batch_size=config.evaluation.batch_size,
        seed=derive_seed(config.seed, "evaluation"),
        device=rack.device,
        autocast=rack.autocast,
        unigram_counts=rack.data.train.counts if rack.data.train.counts.any() else None,
        vocab_size=rack.vocab_size,
    )
    return evaluate(
        rack.front(),
        modules,
        samples,
        rack.objective_of(stages[-1]),
        how,
        progress=None if progress is None else lambda done, stage: progress(done, stage * len(stages)),
        exit_of=rack.exit_of if 1 < len(rack.stages) == config.n_sections and config.time_as_depth else None,
    )


def evaluate_run(run: RunDirectory, *, data: list[str] | None = None, device: str = "auto") -> dict[str, Any]:
    """Held-out figures of a run, or its figures on other text.

    Args:
        data: Files and folders to evaluate on, with the run's tokenizer; None: its own held-out text.

    Raises:
        UsageError: The run is not finished, or the text is shorter than one sample.
        NotFound: There is no run, or no such path.
        DamageError: A committed file is not what it was.
    """
    rack = load_rack(run, resolve_device(device))
    if data is None:
        return evaluate_rack(rack, rack.data.held_out)
    with prepared(rack, data) as text:
        return evaluate_rack(rack, text.held_out)


def evaluate_model(
    weights: str, data: list[str], report: Callable[[str], None], device: str = "auto"
) -> dict[str, Any]:
    """Figures of a pretrained model as it stands, on some text, with one of its parts in memory at a time.

    Args:
        weights: See `load_model`.
        data: Files and folders.
        report: See `load_model`.

    Raises:
        UsageError: See `load_model`; or the text is shorter than one sample.
    """
    rack = load_model(weights, resolve_device(device), report)
    with prepared(rack, data) as text:
        rack = dataclasses.replace(rack, data=text)
        return _evaluated(rack, rack.whole(), rack.stages, text.held_out, None)


@contextlib.contextmanager
def prepared(rack: CommittedRack, data: list[str]) -> Iterator[PreparedData]:
    """Some text as tokens of a rack's tokenizer, all of it held out."""
    with tempfile.TemporaryDirectory(prefix="stackwise-eval-") as directory:
        tokenizer = Path(directory) / "tokenizer.json"
        rack.data.tokenizer.save(tokenizer)
        about, columns = rack.config.data, rack.config.objective.inputs
        if about.chat_template is None and about.tokenizer not in ("bpe", "bytes"):
            copy_template(expanded(about.tokenizer), Path(directory))
        named = about.model_dump(include={"text_column", "follow_links", "chat_template"})
        config = DataConfig(paths=data, tokenizer=str(tokenizer), **named)
        yield prepare(config, out=Path(directory) / "data", all_held_out=True, columns=columns)[0]


def export_rack(rack: CommittedRack, out: Path, options: ExportOptions | None = None) -> Exported:
    """Write a fused rack as one directory: weights, `config.json`, `tokenizer.json`.

    Args:
        rack: The run's weights.
        out: The directory to make.
        options: How; what the run knows of itself is filled in.

    Raises:
        UsageError: The directory is in use.
        NoSpaceError: The disk is full; nothing is left behind.
    """
    options = options or ExportOptions()
    if rack.config.init.weights is not None:
        with contextlib.suppress(UsageError):  # one that is gone, or another model by now, gives nothing along
            with_checkpoint(rack.config)
            options = dataclasses.replace(options, source=getattr(open_weights(rack.config), "checkpoint", None))
    options = dataclasses.replace(
        options,
        tokenizer_json=rack.data.tokenizer.json,
        mask_token_id=rack.mask_token,
        separator_id=rack.data.tokenizer.separator_id,
        causal=rack.objective.causal is True,
    )
    return export(out, rack.front(), rack.modules(), rack.config.model, options)


def export_run_adapters(rack: CommittedRack, out: Path, options: ExportOptions) -> Exported:
    """Write the adapters that a run trained, as peft has them, for the model that it began from.

    Raises:
        UsageError: It trained none, or what they are beside is not that model as it stands.
    """
    config, hint = rack.config, "--format hf merges them"
    if config.training.adapters is None:
        raise UsageError("the run trained no adapters", hint="training.adapters lets some train; or --format hf")
    weights = open_weights(config)
    checkpoint = getattr(weights, "checkpoint", None)
    why = None
    if checkpoint is None:
        why = f"{config.init.weights} is a run, and peft puts adapters on a model"
    elif config.init.blocks is not None:
        why = "the run trained beside some of the model's blocks (init.blocks)"
    elif any(source.merged for source in rack.parts.values()):
        why = "the run trained beside weights with other adapters in them (init.adapters)"
    elif rack.vocab_size != checkpoint.description.vocab_size:
        why = "an id was added to the model, and adapters bring no row for it"
    if why is not None or checkpoint is None:
        raise UsageError(str(why), hint=hint)
    names = {part: part.removeprefix(ADAPTER) for part in rack.parts if part.startswith(ADAPTER)}
    parts = ((block, load_part(rack.parts[part]) or {}) for part, block in names.items())
    return export_adapters(out, checkpoint, config.training.adapters, parts, options)


CHUNKS_AT_ONCE = 16  # chunks that go up together, so that each stage is loaded once for all of them


def recomputer(run: RunDirectory, store: ActivationStore, device: str = "auto") -> Recompute:
    """What `ActivationStore.repair` and `ensure` call to have chunks made again.

    The rows go up from their tokens stage by stage, in the same batches as when the boundary was written, and through
    the codec at each boundary between: so the same machine gives the same bytes.

    Raises:
        UsageError: The run has no committed stage.
    """
    whole = load_rack(run, resolve_device(device), whole=False)

    def recompute(info: BoundaryInfo, chunks: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        rack = _below(whole, info)
        samples_R = _samples(whole, store, info)
        for first in range(0, len(chunks), CHUNKS_AT_ONCE):
            group = chunks[first : first + CHUNKS_AT_ONCE]
            yield from zip(group, _raised(rack, store, info, group, samples_R), strict=True)

    return recompute


def _below(rack: CommittedRack, info: BoundaryInfo) -> CommittedRack:
    """The part of a rack that made a boundary, with the weights of that time."""
    forward = forward_specification(rack.config, rack.vocab_size, rack.mask_token, rack.data.id)
    standing = rack.stages[0].trunk  # what no stage trains below the lowest
    if (
        standing
        and trunk_id(forward, [str(rack.parts[part].digest) for part in standing], rack.stages[0].precisions(standing))
        == info.trunk
    ):
        return dataclasses.replace(rack, parts={part: rack.parts[part] for part in (*standing, HEAD)})
    for stage, versions in zip(rack.stages, rack.versions, strict=True):
        parts = stage.trunk_above
        if not all(part in versions for part in parts):
            continue
        digests = [str(versions[part].digest) for part in parts]
        if trunk_id(forward, digests, stage.precisions(parts)) == info.trunk:
            below = rack.up_to(stage)
            return dataclasses.replace(below, parts={part: versions[part] for part in (*parts, HEAD)})
    why = ": that of an earlier window is gone with its weights" if rack.config.windows > 1 else ""
    raise NotFound(f"no committed stage of this run makes boundary {info.id}{why}")


def _samples(rack: CommittedRack, store: ActivationStore, info: BoundaryInfo) -> np.ndarray:
    """For each row its sample in the run's data."""
    split, seq_len = rack.data.train, rack.config.training.seq_len
    sample_ids = store.rowset(info.rowset).sample_ids
    for number in sorted({stage.rowset for stage in rack.stages}):
        samples_R = choose_samples(rack.config, split, number)
        first, last = _span(info, len(samples_R))
        of_rows = samples_R[first:last]
        if len(of_rows) == len(sample_ids) and (split.sample_ids(seq_len)[of_rows] == sample_ids).all():
            return of_rows
    raise NotFound(f"boundary {info.id} is of other rows than this run's")


def _span(info: BoundaryInfo, rows: int) -> tuple[int, int]:
    """Which of so many rows a boundary has: all, or those of its group."""
    if info.group is None or rows < info.group[1]:
        return 0, rows
    number, count = info.group
    starts = edges(rows, count)
    return starts[number], starts[number + 1]


@torch.no_grad()
def _raised(
    rack: CommittedRack,
    store: ActivationStore,
    info: BoundaryInfo,
    chunks: Sequence[int],
    samples_R: np.ndarray,
) -> list[torch.Tensor]:
    """The rows of some chunks, taken up from their tokens through the rack."""
    seq_len = rack.config.training.seq_len
    size, codec = forward_rows(seq_len), info.codec_object
    stream = rack.autocast or torch.float32
    masks = store.rowset(info.rowset).mask_ids
    ranges = [(chunk * info.chunk_rows, min((chunk + 1) * info.chunk_rows, info.rows)) for chunk in chunks]
    rows = [range(a, min(a + size, stop)) for start, stop in ranges for a in range(start, stop, size)]
    front, objective = rack.front(), rack.objective
    narrow = torch.autocast(rack.device.type, rack.autocast, enabled=rack.autocast is not None)
    carried: list[torch.Tensor] = []
    for stage in rack.modules():
        for place, part in enumerate(rows):
            index = np.arange(part.start, part.stop)
            with narrow:
                if len(carried) == place:
                    tokens = torch.from_numpy(rack.data.train.samples(samples_R[index], seq_len)).to(rack.device)
                    shown = torch.from_numpy(store.masks(masks[index], seq_len))
                    ids = store.rowset(info.rowset).sample_ids[index]
                    split, samples_B = rack.data.train, samples_R[index]
                    columns = {name: split.column(name, samples_B, seq_len) for name in objective.inputs}
                    more = {name: torch.from_numpy(column) for name, column in columns.items()}
                    batch = Batch(index, ids, {TOKENS: tokens, MASKS: shown, **more})
                    entering, times = objective.shown(batch), objective.times(batch)
                    x_BSD = enter(front, entering, times, causal=objective.causal).to(stream)
                    carried.append(torch.empty(0))
                else:  # between frozen blocks below the lowest stage nothing is stored
                    x_BSD = carried[place] if stage.depth < 0 else codec.round_trip(carried[place])
                    x_BSD = x_BSD.to(rack.device, stream)
                carried[place] = stage.forward(x_BSD, _segments(rack, samples_R[index], seq_len)).cpu()
    per_chunk = [len(range(start, stop, size)) for start, stop in ranges]
    edges = np.cumsum([0, *per_chunk])
    return [torch.cat(carried[a:b]) for a, b in itertools.pairwise(edges)]


def _segments(rack: CommittedRack, samples_B: np.ndarray, seq_len: int) -> torch.Tensor | None:
    if not rack.config.data.within_documents:
        return None
    return torch.from_numpy(rack.data.train.segments(samples_B, seq_len)).to(rack.device)


def export_model(weights: str, out: Path, options: ExportOptions, report: Callable[[str], None]) -> Exported:
    """Write a pretrained model again, its tensors as they are where no other dtype is asked for.

    Args:
        weights: A directory of Hugging Face's layout, an export, a finished run, or adapters of peft, which are merged.
        out: The directory to make.
        options: How.
        report: Called with a line on what the model lacks.

    Raises:
        NotFound: There is nothing there.
        UsageError: It is no model, or the directory is in use.
    """
    if RunDirectory(path := expanded(weights).absolute()).manifest_file.exists():
        return export_rack(load_model(weights, torch.device("cpu"), report), out, options)
    if not is_adapter(path):
        checkpoint = Checkpoint(path)
        for line in checkpoint.notes:
            report(line)
        return export_checkpoint(out, checkpoint, options)
    adapted = open_weights(build(StackWiseConfig, {}, {"init.weights": weights}))
    assert isinstance(adapted, Adapted), "adapters are opened over their model"
    for line in adapted.notes:
        report(line)
    wide = getattr(torch, adapted.checkpoint.dtype)  # as its model is: merging goes through float32
    options = dataclasses.replace(options, dtype=options.dtype or wide)
    return export_checkpoint(out, adapted.checkpoint, options, lambda part: load_part(adapted.source(part)) or {})
