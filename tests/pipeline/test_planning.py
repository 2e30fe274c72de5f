"""Plans: memory traced on the real modules and engine, closed forms held to it, machines, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stackwise.cli.app import main
from stackwise.config import StackWiseConfig
from stackwise.config.yaml_files import dump
from stackwise.errors import StackWiseError, UsageError
from stackwise.pipeline.estimate import SHARE, Estimate
from stackwise.pipeline.planning.fit import fit
from stackwise.pipeline.planning.forecast import forecast, grown, streamed
from stackwise.pipeline.planning.machines import EXAMPLE, MACHINES, find
from stackwise.pipeline.planning.trace import PARTS, Tracer
from stackwise.pipeline.schedule import schedule
from tests.conftest import raises_naming

VOCABULARY = {"micro": 258, "smoke": 258, "stages": 4096}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "planning"))


@pytest.fixture(scope="module")
def tracer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracer]:
    """One process for all."""
    with Tracer(tmp_path_factory.mktemp("traces")) as tracer:
        yield tracer


def estimates(preset: str, device: str, *depths: int, **settings: object) -> list[Estimate]:
    config = StackWiseConfig.from_preset(preset, {"precision": "bf16" if device == "cuda" else "fp32", **settings})
    stages = schedule(config)
    size = config.model.vocab_size or VOCABULARY[preset]
    return [Estimate(config, size, stages[depth], device) for depth in depths]


SOME = [("micro", "cpu", 0), ("bert-base", "cuda", 1), ("gpt2-small", "cpu", 1), ("llama-1b", "cuda", 1)]
MORE = [
    *(("micro", "cpu", 1), ("smoke", "cpu", 1), ("stages", "cpu", 1), ("bert-base", "cuda", 0)),
    *(("bert-base", "cpu", 1), ("gpt2-small", "cuda", 0)),
]


@pytest.mark.parametrize("presets", [SOME, pytest.param(MORE, marks=pytest.mark.stress)], ids=["some", "more"])
def test_the_estimate_of_a_presets_stage_is_within_5_percent_of_its_traced_peak(
    presets: list[tuple[str, str, int]], tracer: Tracer
) -> None:
    cases = [estimate for preset, device, depth in presets for estimate in estimates(preset, device, depth)]
    fat = {"training.mode.block_size": 4, "training.accumulation": 2, "training.batch_size": 64}
    for every in (True, 3):
        cases += estimates("bert-base", "cuda", 1, **fat, **{"training.activation_checkpointing": every})
    one = {"training.mode": "layerwise", "training.activation_checkpointing": True}
    cases += estimates("llama-70b", "cuda", 1, **one)
    for estimate in cases:
        found = tracer.traced(estimate)
        assert found.note is None
        assert sum(found.parts[part] for part in PARTS) == found.parts["peak"]
        assert estimate.memory == pytest.approx(found.parts["peak"], rel=0.05), estimate.config.name


GROWING = """
import sys, torch
from stackwise.config.loading import build
from stackwise.config import StackWiseConfig
from stackwise.config.yaml_files import parse_yaml
from stackwise.host import process_bytes
from stackwise.pipeline.device import warm_up
from stackwise.pipeline.schedule import schedule
from stackwise.pipeline.trial import TrialJob, make_batch, make_engine, make_model
text, rows, vocabulary = sys.stdin.read(), int(sys.argv[1]), int(sys.argv[2])
config = build(StackWiseConfig, parse_yaml(text, "job"))
warm_up()
before = process_bytes("VmRSS")
job = TrialJob(text, schedule(config)[0], vocabulary, vocabulary - 1, rows)
engine = make_engine(job, config, make_model(job, config), torch.device("cpu"))
for step in range(3):
    engine.step([make_batch(engine, job, config, rows)], step, 1e-3)
print(before, process_bytes("VmHWM"))
"""
BERT = {"model.norm": "layernorm", "model.positions": "learned", "model.ffn": "gelu", "model.dropout": 0.1}


@pytest.mark.stress
@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")
@pytest.mark.parametrize("settings", [BERT, {}, {"model.d_model": 256}, BERT | {"training.objective": "mlm"}])
def test_what_a_cpu_worker_takes_is_within_15_percent_of_what_is_planned(
    settings: dict[str, Any], tracer: Tracer
) -> None:
    rack = {"model.d_model": 128, "model.architecture.n_stacks": 4, "training.seq_len": 128, "training.block_size": 4}
    for rows in (1, 64):
        (estimate,) = estimates("micro", "cpu", 0, **{**rack, **settings, "training.batch_size": rows})
        found = tracer.traced(estimate)
        command = [sys.executable, "-c", GROWING, str(rows), str(estimate.vocab_size)]
        done = subprocess.run(command, input=dump(estimate.config), capture_output=True, text=True, check=True)
        before, most = map(int, done.stdout.split())
        assert before + grown(found.parts) == pytest.approx(most, rel=0.15)


def test_a_stage_of_many_blocks_is_traced_with_few_and_each_shape_once(tmp_path: Path) -> None:
    settings = {"model.architecture.n_stacks": 12, "model.architecture.blocks_per_stack": 1}
    (twelve,) = estimates("micro", "cpu", 0, **settings, **{"training.mode": "end_to_end"})
    alike = estimates("micro", "cpu", 1, 2, **settings)
    told: list[str] = []
    with Tracer(tmp_path, told.append) as tracer:
        found = tracer.traced(twelve)
        assert len({tracer.traced(one).parts["peak"] for one in alike}) == 1
    assert len(told) == len(list(tmp_path.iterdir())) == 3
    assert twelve.memory == pytest.approx(found.parts["peak"], rel=0.05)
    assert found.parts["weights"] >= 4 * twelve.trained_parameters
    with Tracer(tmp_path, told.append) as tracer:
        assert tracer.traced(twelve) == found
    assert len(told) == 3  # from the cache


def test_a_tracer_whose_process_ends_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Tracer(tmp_path) as tracer, raises_naming(StackWiseError, "ended with 1"):
        tracer.traced(estimates("micro", "cpu", 0)[0])


@pytest.mark.stress
def test_a_stage_of_seventy_billion_parameters_is_traced_as_it_is(tracer: Tracer) -> None:
    cases = estimates("llama-70b", "cuda", 0, 1)
    first, other = map(tracer.traced, cases)
    assert first.parts["gradients"] == pytest.approx(4 * cases[0].trained_parameters, rel=1e-3)
    for estimate, found in zip(cases, (first, other), strict=True):
        assert estimate.memory == pytest.approx(found.parts["peak"], rel=0.01)


def planned(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["plan", "--json", *arguments], standalone_mode=False)
    assert done.exception is None, done.exception
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def test_a_plan_is_what_the_contract_says_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = planned("--preset", "micro", "--gpu", "cpu", "--tokens", "1M", "--price", "2", "--disk", "2GB/s,1GB/s,1TB")
    assert set(plan) == {"parameters", "fits", "stages", "disk", "seconds", "tokens", "advice"}
    assert plan["tokens"] == 10**6
    assert plan["fits"] is True
    assert [stage["blocks"] for stage in plan["stages"]] == [[0, 0], [1, 1]]
    for stage in plan["stages"]:
        assert set(stage) == {"depth", "blocks", "parameters", "memory", "host_memory", "seconds", "bound"}
        assert sum(stage["memory"][part] for part in PARTS) == stage["memory"]["peak"]
        assert stage["bound"] in ("compute", "disk read", "disk write", "host copies")
    assert plan["seconds"] == pytest.approx(sum(stage["seconds"] for stage in plan["stages"]))
    assert plan["disk"]["written"] >= plan["disk"]["live"] > 0 or plan["disk"]["written"] > 0
    assert any("an hour this costs" in line for line in plan["advice"])
    assert not list(tmp_path.iterdir())


def test_sizes_that_fit_are_the_largest_that_do() -> None:
    machine = MACHINES["rtx4090"]

    def peak(**changes: int) -> int:
        given = {"training.swap": "never"} | sizes | changes
        config = StackWiseConfig.from_preset("llama-1b", given)
        return max(stage.memory["peak"] for stage in forecast(config, machine).stages)

    sizes = fit(StackWiseConfig.from_preset("llama-1b"), machine)
    assert sizes["training.batch_size"] * sizes["training.accumulation"] == 4 * 8
    assert peak() <= SHARE * machine.memory
    assert peak(**{"training.mode.block_size": sizes["training.mode.block_size"] + 1}) > SHARE * machine.memory
    assert peak(**{"training.batch_size": 2 * sizes["training.batch_size"]}) > SHARE * machine.memory
    with pytest.raises(UsageError):
        fit(StackWiseConfig.from_preset("llama-1b", {"training.swap": "never"}), replace(machine, memory=1e9))
    with raises_naming(UsageError, "stage 0", "100 MB"):
        fit(StackWiseConfig.from_preset("llama-1b"), replace(machine, memory=1e8))


@pytest.mark.parametrize(("name", "blocks"), [("rtx4090", 80), ("l40s", 1), ("a100-80", 3), ("h200", 6)])
def test_sizes_of_seventy_billion_parameters_for_a_card_fit_it_and_its_disk(name: str, blocks: int) -> None:
    """Where not one block fits, stages are swapped; where two boundaries of all rows do not, rows come in windows."""
    machine = MACHINES[name]
    sizes = fit(StackWiseConfig.from_preset("llama-70b"), machine, 10**9)
    assert sizes["training.mode.block_size"] == blocks
    planned = forecast(StackWiseConfig.from_preset("llama-70b", sizes), machine, 10**9)
    assert planned.fits
    assert all(stage.memory["peak"] <= SHARE * machine.memory for stage in planned.stages)
    assert all((stage.swap is not None) == (blocks == 80) for stage in planned.stages)
    assert ("training.windows" in sizes) == (blocks < 80)


@pytest.mark.parametrize(
    "settings",
    [
        {"training.mode": "layerwise"},
        {"training.growth": [{"blocks": 1, "until": 0.5}]},
        {"training.mode": {"name": "blockwise", "n_stages": 2}},
    ],
)
def test_sizes_that_fit_come_with_the_mode_that_has_them(settings: dict[str, Any]) -> None:
    sizes = fit(StackWiseConfig.from_preset("micro", settings), MACHINES["cpu"], 10**6)
    (stage,) = forecast(StackWiseConfig.from_preset("micro", settings | sizes), MACHINES["cpu"], 10**6).stages
    assert (stage.stage.first, stage.stage.last) == (0, 1)


def test_what_a_swapped_stage_takes_is_the_sum_of_its_parts_and_no_more_than_its_plan() -> None:
    """A stage of one block, whose head and block take turns."""
    config = StackWiseConfig.from_preset("llama-70b", {"training.mode": "layerwise"})
    for stage in forecast(config, MACHINES["rtx4090"], 10**9).stages[::79]:
        assert stage.swap is not None
        assert stage.memory["peak"] == pytest.approx(stage.swap.memory, rel=0.01)


def test_stages_that_take_too_much_are_named_together() -> None:
    config = StackWiseConfig.from_preset("llama-70b", {"training.mode": "layerwise", "training.swap": "never"})
    lines = forecast(config, MACHINES["rtx4090"], 10**6).misfits()
    assert [line.split(" take")[0] for line in lines] == ["stage 0", "each of stages 1–79"]


def test_sizes_that_fit_are_so_by_the_trace(tracer: Tracer) -> None:
    """On a machine where the closed forms' largest stage comes near to the limit."""
    config = StackWiseConfig.from_preset("micro", {"training.swap": "never"})
    whole = forecast(config, MACHINES["cpu"])
    machine = replace(MACHINES["cpu"], memory=max(s.memory["peak"] for s in whole.stages) / SHARE)
    sizes = fit(config, machine, tracer=tracer)
    fitted = StackWiseConfig.from_preset("micro", {"training.swap": "never"} | sizes)
    planned = forecast(fitted, machine, tracer=tracer)
    assert max(stage.memory["peak"] for stage in planned.stages) <= SHARE * machine.memory


def test_what_does_not_fit_is_told_with_changes_that_help() -> None:
    config = StackWiseConfig.from_preset("llama-1b", {"training.mode.block_size": 16, "training.swap": "never"})
    small = replace(MACHINES["rtx4090"], disk=replace(MACHINES["rtx4090"].disk, size=1e11))
    whole = forecast(config, small, 10**9)
    assert not whole.fits
    from stackwise.pipeline.planning.advice import advise, alternatives

    lines = advise(whole, None)
    assert any(line.startswith("training.mode.block_size: ") for line in lines)
    assert any(line.startswith("training.swap: auto") for line in lines)
    for size in (2e11, 1e9):  # enough for some windows, and not even for weights
        on = replace(small, disk=replace(small.disk, size=size))
        staged = forecast(StackWiseConfig.from_preset("llama-1b"), on, 10**9)
        assert any(line.startswith("training.windows: ") for line in advise(staged, None))
    others = {other.name.split(",")[0].split(" over")[0]: other for other in alternatives(whole)}
    assert {"resident stages of 1 block", "the whole rack end to end", "QLoRA end to end"} <= set(others)
    assert others["resident stages of 1 block"].memory < max(s.memory["peak"] for s in whole.stages)


def test_a_rack_that_grows_is_compared_with_those_that_do_not_and_proposed_to_them() -> None:
    from stackwise.pipeline.planning.advice import advise, alternatives

    machine = replace(MACHINES["cpu"], disk=replace(MACHINES["cpu"].disk, size=1e6))
    growing = forecast(
        StackWiseConfig.from_preset("micro", {"training.growth": [{"blocks": 1, "until": 0.5}]}), machine
    )
    others = {other.name: other for other in alternatives(growing)}
    assert others["resident stages of 1 block"].memory < max(s.memory["peak"] for s in growing.stages)
    assert not any(line.startswith("store.") for line in advise(growing, None)), "it stores no boundary"
    staged = forecast(StackWiseConfig.from_preset("micro"), machine)
    assert any(line.startswith("training.growth: [{blocks: 1, until: 0.8}]") for line in advise(staged, None))


def test_what_a_reader_maps_of_its_boundary_counts_as_memory_as_far_as_there_is_room() -> None:
    def hosts(ram: float, **store: str) -> list[int]:
        config = StackWiseConfig.from_preset("micro", {"store": store} if store else {})
        return [s.host_memory for s in forecast(config, replace(MACHINES["cpu"], ram=ram), 10**8).stages]

    mapped, read = hosts(64e9), hosts(64e9, codec="bf16-zstd")
    assert mapped[0] == read[0]
    assert mapped[1] > read[1]
    assert hosts(1.0) == hosts(1.0, codec="bf16-zstd")  # it takes no room that there is not


def test_twice_the_disk_s_rate_halves_a_read_that_bounds_a_stage() -> None:
    config = StackWiseConfig.from_preset("llama-1b", {"training.epochs_per_layer": 1})
    slow, fast = (
        forecast(config, replace(MACHINES["h200"], disk=replace(MACHINES["h200"].disk, read=rate, write=rate)))
        for rate in (1e7, 2e7)
    )
    assert {stage.bound for stage in slow.stages[1:-1]} <= {"disk read", "disk write"}
    assert slow.stages[-1].seconds == pytest.approx(2 * fast.stages[-1].seconds, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "h20"], "did you mean h200"),
        (["--gpu", "mine.yaml"], "No such file"),
        (["--gpu", "h200", "--disk", "fast"], "is no size"),
        (["--gpu", "h200", "--disk", "7"], "unit is missing"),
        (["--gpu", "h200", "--ram", "128"], "unit is missing"),
        (["--gpu", "h200", "--disk", "1GB/s,2GB/s,3GB/s"], "one or two rates"),
        (["--gpu", "h200", "--ram", "-1"], "is no size"),
        (["--gpu", "h200", "--tokens", "many"], "no number of tokens"),
        (["--gpu", "h200", "--tokens", "0"], "no number of tokens"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_traced(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(main, ["plan", "--preset", "micro", *arguments], standalone_mode=False)
    assert isinstance(done.exception, StackWiseError)
    assert done.exception.exit_code == 2
    assert said in str(done.exception)


def test_a_user_s_own_machine_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("memory: 48GB\nflops: 100T\nbandwidth: 900GB/s\ndisk: 3GB/s,2TB\n")
    machine = find(str(path))
    assert (machine.memory, machine.flops, machine.disk.read, machine.disk.size) == (48e9, 1e14, 3e9, 2e12)
    path.write_text("memory: lots\nfloops: 3\n")
    with raises_naming(UsageError, "floops", "flops: ", "memory", "'lots'"):
        find(str(path))
    path.write_text("memory: 48\nflops: 100T\nbandwidth: 900\n")  # of what, nobody can know
    with raises_naming(UsageError, "memory", "'48'", "bandwidth", "'900'"):
        find(str(path))


def test_the_description_that_messages_propose_can_be_copied(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(EXAMPLE)
    machine = find(str(path))
    assert (machine.name, machine.memory, machine.ram, machine.host) == ("mine", 24e9, 64e9, 25e9)
    assert (machine.disk.read, machine.disk.size) == (7e9, 4e12)


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_what_a_step_of_a_streamed_stage_moves_is_what_its_plan_says(tmp_path: Path, clip: float) -> None:
    """The bytes that the engine reads and writes, counted by the system."""
    from tests.training.swapping import RackParts, engine, microbatches

    config = StackWiseConfig.from_preset(
        "micro",
        {"training.mode": "end_to_end", "training.swap": "always", "training.accumulation": 3, "training.batch_size": 4,
         "training.grad_clip": clip, "training.seq_len": 12, "model.d_model": 256, "model.n_heads": 2,
         "model.architecture.n_stacks": 3},
    )  # fmt: skip
    (stage,) = schedule(config)
    estimate = Estimate(config, 24, stage)
    swap = estimate.swap(1 << 20)
    assert swap is not None
    assert (swap.groups, swap.passes) == (3, 0)
    swapped = engine(RackParts(3, width=256), tmp_path / "swap", groups=3, grad_clip=clip)
    done: list[tuple[int, int]] = []
    for step in range(4):
        swapped.step(microbatches(step, 3), step, 1e-3)
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        done.append((int(counts["rchar"]), int(counts["wchar"])))
    swapped.close()
    moved = streamed(estimate, replace(swap, boundaries=0))
    read, written = (after - before for before, after in zip(done[2], done[3], strict=True))
    assert read == pytest.approx(moved.read, rel=0.05)
    assert written == pytest.approx(moved.written, rel=0.05)


def test_70b_streams_at_more_than_60_percent_of_its_speed_in_memory() -> None:
    """Half a million tokens a step, a card with 128 GB beside it, a disk of 7 GB/s; with few tokens it does not."""
    machine = replace(MACHINES["h200"], ram=128e9, disk=replace(MACHINES["h200"].disk, read=7e9, write=7e9))
    speeds = []
    for accumulation in (32, 4):
        config = StackWiseConfig.from_preset(
            "llama-70b",
            {"training.mode": "end_to_end", "training.batch_size": 8, "training.accumulation": accumulation},
        )
        (stage,) = forecast(config, machine).stages
        assert stage.swap is not None
        assert stage.memory["peak"] < machine.memory
        assert stage.host_memory < machine.ram
        speeds.append(stage.reached or 0.0)
        slower = forecast(config, replace(machine, host=machine.host / 40)).stages[0]
        assert slower.bound == "host copies"
    assert speeds[0] > 0.6 > speeds[1]


def test_of_a_divided_stage_the_rank_that_takes_most_is_planned(tmp_path: Path) -> None:
    """State by slices; front and head with one place each."""
    whole = estimates("llama-8b", "cuda", 1)[0]
    state = whole.state_bytes(gradients=True)

    def planned(**parallel: object) -> dict[str, int]:
        one = estimates("llama-8b", "cuda", 1, parallel=parallel)[0]
        with Tracer(tmp_path) as tracer:
            parts = tracer.traced(one).parts
        assert parts["peak"] == one.memory
        return parts

    quarter = planned(shard=4)
    assert sum(quarter[part] for part in ("weights", "gradients", "optimizer")) == pytest.approx(state / 4, rel=0.01)
    assert quarter["peak"] < whole.memory
    assert planned(shard=4, zero=2)["buffers"] >= quarter["buffers"]
    assert planned(shard=4, zero=1)["buffers"] > planned(shard=4, zero=2)["buffers"]
    assert planned(tensor=2)["activations"] == pytest.approx(quarter["activations"] / 2, rel=0.01)
    assert not list(tmp_path.iterdir())  # nothing was traced
