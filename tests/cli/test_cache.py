"""`cache …` against the contract, on a run's store and on damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from stackwise.store import ActivationStore
from tests.cli.conftest import Cli, stackwise


@pytest.fixture
def store(finished: Path) -> Path:
    return finished / "store"


def chunk(store: Path) -> Path:
    return next(path for path in store.glob("boundaries/*/activations/c/**/*") if path.is_file())


def test_inspect(store: Path, here: Path, cli: Cli) -> None:
    value = json.loads(cli("cache", "inspect", "--json").stdout)
    assert set(value) >= {"format", "masks", "boundaries", "index"}
    assert set(value["masks"]) == {"unique", "referenced"}
    assert set(value["index"]) >= {"entries", "bytes"}
    (boundary,) = value["boundaries"]
    keys = ["id", "depth", "trunk", "rows", "shape", "dtype", "codec", "chunks", "logical_bytes", "disk_bytes", "state"]
    assert set(keys) <= set(boundary)
    assert boundary["shape"] == [boundary["rows"], 32, 32]
    assert boundary["id"] in cli("cache", "inspect", "--store", str(store)).stdout


def test_inspect_says_what_the_run_needs_next(finished: Path, store: Path, here: Path, cli: Cli) -> None:
    value = json.loads(cli("cache", "inspect", "--json").stdout)
    boundary, planned = value["boundaries"][0], value["planned"]
    assert (planned["stage"], planned["needed"], planned["stored"]) == (None, 0, boundary["disk_bytes"])
    assert planned["free"] > 0
    assert "no boundary is to come" in cli("cache", "inspect").stdout
    assert json.loads(cli("cache", "inspect", "--store", str(store), "--json").stdout)["planned"] is None

    manifest = finished / "run.json"
    after = json.loads(manifest.read_text())
    after["stages"][1]["state"] = "pending"
    manifest.write_text(json.dumps(after))  # stage 1 is to be trained, and its boundary is complete
    assert json.loads(cli("cache", "inspect", "--json").stdout)["planned"]["stage"] is None
    with ActivationStore(store) as opened:
        opened.drop(boundary["id"])
    planned = json.loads(cli("cache", "inspect", "--json").stdout)["planned"]
    assert (planned["stage"], planned["rows"]) == (1, boundary["rows"])
    assert planned["needed"] == boundary["logical_bytes"]
    said = cli("cache", "inspect").stdout
    assert "the next boundary (for stage 1) needs" in said
    assert "free" in said


def test_ls_and_du(store: Path, here: Path, cli: Cli) -> None:
    value = json.loads(cli("cache", "ls", "--json").stdout)
    assert [stage["depth"] for stage in value["stages"]] == [0, 1]
    assert value["stages"][0]["parts"] == ["block.0", "front", "head"]
    assert all(stage["recipe"] in cli("cache", "ls").stdout for stage in value["stages"])
    value = json.loads(cli("cache", "du", "--json").stdout)
    assert value["total"] > value["boundaries"] > 0
    assert "free on this disk" in cli("cache", "du").stdout


def test_verify_finds_nothing_in_a_sound_store(store: Path, here: Path, cli: Cli) -> None:
    result = cli("cache", "verify", "--json")
    assert result.exit_code == 0
    value = json.loads(result.stdout)
    assert (value["checked_chunks"], value["damaged"], value["orphans"]) == (1, [], [])
    assert "no damage" in cli("cache", "verify", "--fast").stdout


def test_verify_names_damage_and_ends_with_3(store: Path, here: Path, cli: Cli) -> None:
    path = chunk(store)
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    result = cli("cache", "verify", "--json")
    assert result.exit_code == 3
    (damage,) = json.loads(result.stdout)["damaged"]
    assert set(damage) == {"boundary", "chunk", "fault"}
    assert (damage["boundary"], damage["chunk"]) == (path.relative_to(store).parts[1], 0)
    assert damage["boundary"] in cli("cache", "verify").stdout


def test_repair_takes_out_what_is_damaged_where_no_run_can_make_it_again(store: Path, here: Path, cli: Cli) -> None:
    alone = ("--store", str(store))
    chunk(store).unlink()
    planned = cli("cache", "repair", *alone, "--dry-run", "--json")
    assert planned.exit_code == 3
    assert json.loads(planned.stdout)["gone"]
    assert cli("cache", "verify", *alone).exit_code == 3
    assert cli("cache", "repair", *alone).exit_code == 3
    assert cli("cache", "verify", *alone).exit_code == 0
    assert "nothing to repair" in cli("cache", "repair", *alone).stdout


def test_repair_makes_again_what_the_runs_weights_can(store: Path, here: Path, cli: Cli) -> None:
    file = chunk(store)
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    repaired = cli("cache", "repair", "--json")
    assert repaired.exit_code == 0
    assert json.loads(repaired.stdout)["repaired"]
    assert file.read_bytes() == before
    assert cli("cache", "verify").exit_code == 0


def test_a_lost_index_is_rebuilt(store: Path, here: Path, cli: Cli) -> None:
    (store / "index" / "data.mdb").unlink()
    broken = cli("cache", "verify", "--json")
    assert broken.exit_code == 3
    assert json.loads(broken.stdout)["damaged"]
    repaired = cli("cache", "repair", "--json")
    assert repaired.exit_code == 0
    assert json.loads(repaired.stdout)["index"] == "rebuilt"
    assert cli("cache", "verify").exit_code == 0


def test_gc_keeps_what_a_run_refers_to(store: Path, here: Path, cli: Cli) -> None:
    shutil.copytree(store, "alone")
    # The copy's registration names the run that made it: it is kept until that is forgotten.
    value = json.loads(cli("cache", "gc", "--store", "alone", "--json").stdout)
    assert (value["boundaries"], value["stages"]) == ([], [])
    assert json.loads(cli("cache", "inspect", "--store", "alone", "--json").stdout)["boundaries"]
    assert "0 B would be freed" in cli("cache", "gc", "--dry-run").stdout


def test_gc_forgets_a_run_that_is_gone_where_asked(store: Path, here: Path, cli: Cli, tmp_path: Path) -> None:
    shutil.copytree(store, "alone")
    with ActivationStore(here / "alone") as opened:
        for key in opened.runs():
            refers = opened.runs()[key]
            opened.forget_run(key)
            opened.register_run(str(tmp_path / "gone"), recipes=refers["recipes"], boundaries=refers["boundaries"])
    named = cli("cache", "gc", "--store", "alone")
    assert str(tmp_path / "gone") in named.output
    assert "--forget-missing" in named.output
    planned = json.loads(cli("cache", "gc", "--store", "alone", "--forget-missing", "--dry-run", "--json").stdout)
    assert planned["freed"] > 0
    done = json.loads(cli("cache", "gc", "--store", "alone", "--forget-missing", "--json").stdout)
    assert (done["boundaries"], done["stages"]) == (planned["boundaries"], planned["stages"])
    assert json.loads(cli("cache", "inspect", "--store", "alone", "--json").stdout)["boundaries"] == []


def test_repair_removes_a_damaged_stage_where_asked(store: Path, here: Path, cli: Cli) -> None:
    shutil.copytree(store, "alone")
    part = next(Path("alone/stages").glob("*/*.safetensors"))
    part.write_bytes(b"x")
    kept = cli("cache", "repair", "--store", "alone")
    assert (kept.exit_code, part.exists()) == (3, True)
    dropped = cli("cache", "repair", "--store", "alone", "--drop-stages")
    assert (dropped.exit_code, part.exists()) == (3, False)
    assert part.parent.name in dropped.stdout
    assert cli("cache", "repair", "--store", "alone").exit_code == 0


def test_unlock(store: Path, here: Path, cli: Cli) -> None:
    assert cli("cache", "unlock").exit_code == 0
    assert set(json.loads(cli("cache", "unlock", "--json").stdout)) == {"stale_readers", "removed", "held"}


def test_wrong_uses(store: Path, here: Path, cli: Cli) -> None:
    assert cli("cache", "inspect", "--run", "runs/micro", "--store", str(store)).exit_code == 2
    assert cli("cache", "inspect", "--store", "nowhere").exit_code == 2
    assert cli("cache", "inspect", "--store", "runs").exit_code == 2
    assert cli("cache", "verify", "--subset", "0").exit_code == 2
    assert not Path("runs/format.json").exists()


def test_a_store_elsewhere_is_found_through_its_run(finished: Path, here: Path, cli: Cli) -> None:
    (finished / "store").rename(here / "elsewhere")
    path = finished / "stackwise.yaml"
    path.write_text(path.read_text().replace("store:\n  path: null", f"store:\n  path: {here / 'elsewhere'}"))
    assert cli("cache", "inspect").stdout.startswith(str(here / "elsewhere"))


def test_a_newer_store_is_refused_as_a_program(store: Path, here: Path) -> None:
    (store / "format.json").write_text('{"format": 99}')
    done = stackwise("cache", "inspect", cwd=here)
    assert done.code == 2
    assert "format 99" in done.err
