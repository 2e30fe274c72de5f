"""What no configuration can be: refused in one line each, with exit code 2, at once and in little memory."""

from __future__ import annotations

import copy
import math
import os
import random
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stackwise.config import StackWiseConfig
from stackwise.config.fields import Section
from stackwise.config.kinds import Kind
from stackwise.config.loading import build, leaves, parse_overrides
from stackwise.config.translations import TABLE
from stackwise.config.unused import unused_settings
from stackwise.config.yaml_files import dump, parse_yaml
from stackwise.errors import ConfigError, UsageError
from tests.conftest import raises_naming

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
HOSTILE = {
    "a vocabulary beyond any memory": ("model: {vocab_size: 99999999999}", "model.vocab_size"),
    "a width beyond any memory": ("model: {d_model: 1000000000}", "model.d_model"),
    "stacks beyond any list": ("model: {architecture: {n_stacks: 1000000000}}", "model.architecture.n_stacks"),
    "blocks by product": (
        "model: {architecture: {n_stacks: 1000, blocks_per_stack: 1000}}",
        "model.architecture.n_stacks",
    ),
    "parameters by product": ("model: {d_model: 16000000, n_heads: 1000000}", "model.d_model"),
    "an embedding by product": ("model: {d_model: 1000000, n_heads: 10, vocab_size: 16000000}", "model.vocab_size"),
    "a pool of masks beyond any memory": ("training: {mask_pool: 1099511627776}", "training.mask_pool"),
    "a batch by product": ("training: {seq_len: 16000000, batch_size: 16000000}", "training.batch_size"),
    "a number of 5000 digits": ("seed: " + "9" * 5000, "line 1, column 7"),
    "a hexadecimal number without end": ("seed: 0x" + "f" * 5000, "line 1, column 7"),
    "an exponent without end": ("seed: 1e99999", "seed"),
    "no number": ("training: {learning_rate: .nan}", "training.learning_rate"),
    "an infinite number": ("training: {learning_rate: .inf}", "training.learning_rate"),
    "no number in a list": ("training: {mask_windows: [[.nan, 1]]}", "training.mask_windows"),
    "a word for a switch": ("training: {compile: fast}", "training.compile"),
    "a word for a number": ("training: {batch_size: many}", "training.batch_size"),
    "a list for a switch": ("training: {compile: [true]}", "training.compile"),
    "true for a number": ("training: {steps: true}", "training.steps"),
    "true for a rate": ("training: {learning_rate: true}", "training.learning_rate"),
    "an octal number": ("training: {steps: 010}", "line 1, column 19"),
    "a number in base 60": ("training: {steps: 1:30:00}", "training.steps"),
    "a fraction in base 60": ("training: {steps: 1:30.5}", "training.steps"),
    "a date": ("name: 2020-01-01", "line 1, column 7"),
    "a date that is none": ("name: 2020-99-99", "line 1, column 7"),
    "a time": ("name: 2020-01-01 10:00:00", "line 1, column 7"),
    "nesting without end": ("name: " + "[" * 6000, "line 1, column 30"),
    "mappings without end": ("\n".join(" " * i + f"a{i}:" for i in range(500)), "line 24, column 24"),
    "an alias bomb": (BOMB, "line 5, column 8"),
    "an alias of what it is in": ("a: &a [*a]", "line 1, column 8"),
    "too many values": ("data: {paths: [" + "x, " * 11_000 + "]}", "line 1, column 30001"),
    "a merge key": ("a: &a {x: 1}\nmodel: {<<: *a}", "line 2, column 9"),
    "a tag": ("name: !!binary abc", "line 1, column 7"),
    "a tag of one's own": ("name: !mine x", "line 1, column 7"),
    "a key that is a list": ("? [1]\n: 2", "line 1, column 3"),
    "a key that is a mapping": ("? {a: 1}\n: 2", "line 1, column 3"),
    "a key that is true": ("true: 1", "line 1, column 1"),
    "a key that is null": ("null: 1", "line 1, column 1"),
    "a key that is a fraction": ("1.5: 2", "line 1, column 1"),
    "a stage that is no number": ("stages: {x: {}}", "stages.x"),
    "a stage beyond the schedule": ("stages: {99999999: {}}", "stages.99999999"),
    "a line break in a value": ('slurm: {partition: "a\\nb"}', "slurm.partition"),
    "a line break in a key": ('slurm: {parameters: {"a\\nb": 1}}', r"slurm.parameters.a\x0ab"),
    "an escape sequence": ('tracking: {project: "a\\e[31m"}', "tracking.project"),
    "an escape sequence in a key": ('"a\\e[31m": 1', r"a\x1b[31m"),
    "half a character": ('slurm: {partition: "\\ud800"}', "line 1, column 20"),
    "half a character in a key": ('training: {"\\ud800": 1}', "line 1, column 12"),
    "half a character in a list": ('data: {paths: ["\\udfff"]}', "line 1, column 16"),
    "a key that is empty": ('training: {"": 1}', "line 1, column 12"),
    "a key that is a number": ("1: 2", "1"),
    "two documents": ("name: a\n---\nname: b", "line 2, column 1"),
    "a kind that is a list": ("training: {optimizer: [1]}", "training.optimizer"),
    "a kind whose name is none": ("training: {optimizer: {name: [1]}}", "training.optimizer"),
    "a kind in a list without its name": ("tracking: {trackers: [{name: mlflow, uri: x}]}", "tracking.trackers.0"),
    "a kind with a key that is a number": ("training: {optimizer: {1: 2}}", "training.optimizer.1"),
    "a kind without what it requires": ("model: {attention: gqa}", "model.attention"),
    "an old key with a faulty value": ("model: {n_kv_heads: [1]}", "model.attention.kv_heads"),
    "an old key beside a faulty kind": ("model: {n_kv_heads: 2, attention: 3}", "model.attention"),
    "a codec that there is not": ("store: {codec: ../x}", "store.codec"),
    "adapters that double without end": (
        "model: {architecture: {n_stacks: 1024}}\ntraining: {progressive: {enabled: true, trunk_strategy: qlora, "
        "qlora_strategy: progressive, qlora_rank_pattern: increasing}}",
        "training.progressive.qlora_rank",
    ),
}


@pytest.mark.parametrize(("text", "where"), HOSTILE.values(), ids=HOSTILE)
def test_what_nothing_could_hold_is_one_line(text: str, where: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    begun = time.process_time()
    with pytest.raises(ConfigError) as refused:
        StackWiseConfig.from_yaml(str(path))
    assert refused.value.exit_code == 2
    assert any(fault.startswith(f"{where}: ") for fault in refused.value.faults)
    assert all(fault.isprintable() for fault in refused.value.faults)
    assert time.process_time() - begun < 10


def test_what_is_no_file_of_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "utf16").write_bytes("name: a".encode("utf-16"))
    (tmp_path / "latin1").write_bytes(b"name: \xe9")
    (tmp_path / "large").write_text("# " + "a" * 300_000)
    for name in ("fifo", "loop", "utf16", "latin1", "large", ".", "\0"):
        with raises_naming(UsageError, tmp_path if name == "." else tmp_path / name.replace("\0", "")) as refused:
            StackWiseConfig.from_yaml(str(tmp_path / name))
        assert refused.value.exit_code == 2
    with raises_naming(UsageError, "/dev/zero"):
        StackWiseConfig.from_yaml("/dev/zero")
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfname: a\n")
    (tmp_path / "link").symlink_to("c.yaml")
    assert StackWiseConfig.from_yaml(str(tmp_path / "link")).name == "a", "what a user names may be a link"


@pytest.mark.parametrize("item", ["a..b=1", ".=1", "a.=1", "\x1b[31m=1", "a." * 50 + "b=1", "=1", "seed"])
def test_an_override_without_a_key(item: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_overrides([item])
    assert refused.value.exit_code == 2
    assert "\x1b" not in str(refused.value)


def test_plain_aliases_are_read() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x\n", "c.yaml") == {"a": [1, 2], "b": [1, 2]}


def test_an_unknown_key_names_what_is_near_and_never_all_there_is() -> None:
    with pytest.raises(ConfigError) as refused:
        StackWiseConfig.from_preset("micro", {"training.zzzz": 1, "training.mask_shedule_typ": 1, "model.d_modell": 1})
    assert all(len(fault) < 200 for fault in refused.value.faults)
    said = "\n".join(refused.value.faults)
    assert "training.mask_schedule_type" in said
    assert "model.d_model" in said


@pytest.mark.parametrize("key", ["-1", "x", "9999999999999999"])
def test_a_stage_that_cannot_be_is_named_by_its_key(key: str) -> None:
    for overrides in ({f"stages.{key}.training.steps": 3}, {"stages": parse_yaml(f"{{{key}: {{}}}}", "c.yaml")}):
        with raises_naming(ConfigError, "stages", key) as refused:
            StackWiseConfig.from_preset("micro", overrides)
        assert "{" not in str(refused.value), "what it says of the stage is not at fault"


def optional_keys(section: type[Section], prefix: str, tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """A configuration, and a key of each section that may be null, is one of a list, or of a numbered mapping."""
    for name, field in section.model_fields.items():
        kinds, key = [field.annotation, *typing.get_args(field.annotation)], f"{prefix}{name}"
        here = next(
            (k for k in kinds if isinstance(k, type) and issubclass(k, Section) and not issubclass(k, Kind)), None
        )
        if here is None:
            continue
        if typing.get_origin(field.annotation) is dict:
            key = f"{key}.0"
        if typing.get_origin(field.annotation) is list:
            required = {name: "x" for name, one in here.model_fields.items() if one.is_required()}
            tree, key = tree | {key: [required]}, f"{key}.0"
        if here is not field.annotation or prefix.startswith("stages."):
            yield from ((tree, f"{key}.{last}") for last in here.model_fields)
        yield from optional_keys(here, f"{key}.", tree)


OPTIONAL = {key: tree for tree, key in optional_keys(StackWiseConfig, "", {})}


def test_keys_of_sections_that_may_be_null_or_are_numbered_are_found() -> None:
    assert {"training.meta.inner_steps", "stages.0.training.learning_rate", "training.growth.0.until"} <= set(OPTIONAL)
    assert len(OPTIONAL) > 50
    lost = []
    for key, tree in OPTIONAL.items():
        above, _, name = key.rpartition(".")
        wrong = f"{above}.{name[:2]}{name[3:]}" if len(name) > 4 else f"{above}.{name}{name[-1]}"
        try:
            StackWiseConfig.from_preset("micro", tree | {wrong: 1})
        except ConfigError as refused:
            about = [fault.removeprefix(wrong) for fault in refused.faults if fault.startswith(f"{wrong}: ")]
            if not any(key in fault for fault in about):
                lost.append((wrong, refused.faults))
    assert lost == []


VALUES: list[Any] = [
    *(
        None,
        True,
        0,
        -1,
        3,
        2**40,
        10**17,
        1.5,
        1e300,
        math.nan,
        math.inf,
        "",
        "x",
        "auto",
        "none",
        "muon",
        "mla",
        "all",
    ),
    *([], [1], ["x"], [[1]], {}, {"name": "muon"}, {"kind": "mla", "kv_rank": 0}, {1: 2}, "clm", "\n", "\x1b"),
    {0: {"training": {"muon_momentum": 0.3}}},
]
"""What a key may be set to by someone who means no good, or knows no better."""


@pytest.mark.parametrize("trials", [30, pytest.param(1500, marks=pytest.mark.stress)])
def test_whatever_is_written_is_read_or_refused(trials: int, tmp_path: Path) -> None:
    draw = random.Random(7)
    bases = [StackWiseConfig.from_preset(name) for name in ("micro", "llama-70b")]
    bases.append(StackWiseConfig.from_yaml(str(Path(__file__).parent / "earlier.yaml")))
    keys = [key for base in bases for key, _ in leaves(base.model_dump())] + [row.old for row in TABLE]
    keys += [f"training.progressive.{name}" for name in ("time_interpretation", "training_objective", "enabled")]
    path = tmp_path / "c.yaml"
    for _ in range(trials):
        text = bytearray(dump(draw.choice(bases)).encode())
        for _ in range(draw.choice([0, 0, 1, 4])):
            text[draw.randrange(len(text))] = draw.randrange(256)
        path.write_bytes(text)
        overrides = {draw.choice(keys): copy.deepcopy(draw.choice(VALUES)) for _ in range(draw.randint(0, 3))}
        config, refusal = None, ""
        try:
            config = StackWiseConfig.from_yaml(str(path), overrides)
        except UsageError as error:
            refusal = str(error)
        assert refusal.replace("\n", "").isprintable(), overrides
        if config is None:
            continue
        unused_settings(config)
        assert build(StackWiseConfig, parse_yaml(dump(config), "saved")) == config, overrides


def test_numbered_mappings_take_single_items() -> None:
    given = {"training.block_learning_rates.0": 1e-4, "stages.1.training.block_learning_rates.1": 1e-5}
    config = StackWiseConfig.from_preset("micro", given)
    assert config.training.block_learning_rates == {0: 1e-4}
    assert config.stages[1].training.block_learning_rates == {1: 1e-5}
    with raises_naming(ConfigError, "training.growth", "list"):
        StackWiseConfig.from_preset("micro", {"training.growth.0.until": 0.5})
