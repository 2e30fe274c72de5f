"""`training.compile`: what is used is found before anything is hashed, and what was compiled is found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.runner.auto import settle_compile
from stackwise.pipeline.runner.preparation import prepare_data
from stackwise.pipeline.trial import CompileJob
from tests.conftest import Micro, run
from tests.pipeline.test_run import weights

SMALL = {"data__max_bytes": 40_000, "training__steps": 2}


def test_auto_compiles_where_the_machine_can(micro: Micro, cache: Path) -> None:
    jobs: list[CompileJob] = []
    said: list[str] = []

    def settled(machine: dict[str, Any], fault: str | None = None, **settings: Any) -> bool | None:
        def work(job: CompileJob) -> list[dict[str, Any]]:
            jobs.append(job)
            return [{"event": "trial", "fault": fault}]

        config = micro(**SMALL, **settings)
        assert not config.training.compile  # until it is known, it is off
        data = prepare_data(config, lambda kind, **_: None, lambda: None)
        known = settle_compile(
            config, data, {}, machine, work, lambda kind, **more: said.append(more.get("text", kind))
        )
        settle_compile(config, data, known, machine, work, lambda kind, **_: None)  # once is enough
        return config.training.compile

    card = {"device": "cuda", "name": "a card", "compiles": True}
    assert settled({"device": "cpu", "name": "2 CPU cores"}) is False
    assert settled(card, parallel__shard=2) is False
    assert settled(card, training__meta={"method": "fomaml"}) is False
    assert not jobs
    assert settled(card) is True
    assert len(jobs[0].stage.blocks) == len(jobs) == 1
    assert settled(card, "InductorError: no kernel") is False
    assert [text for text in said if "no kernel" in text and text.startswith("training.compile")] == said[-1:]


def test_blocks_that_do_not_compile_run_as_they_are(
    micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # nor anything compiled before
    events = run(micro(**SMALL, training__compile=True), tmp_path / "run", only=0)
    (warning,) = (event["text"] for event in events if event["event"] == "warning")
    assert warning.startswith("training.compile: ")
    assert "\n" not in warning
    directory = RunDirectory(tmp_path / "run")
    assert directory.config().training.compile is False
    run(micro(**SMALL), tmp_path / "plain", only=0)
    assert weights(tmp_path / "run") == weights(tmp_path / "plain")


@pytest.mark.stress
def test_a_second_process_finds_what_was_compiled(micro: Micro, cache: Path, tmp_path: Path) -> None:
    def files() -> dict[str, tuple[int, int]]:
        kept = (cache / "stackwise" / "inductor").rglob("*")
        return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in kept if path.suffix == ".so"}

    events = run(micro(**SMALL, training__compile=True), tmp_path / "run")
    assert not [event for event in events if event["event"] == "warning"]
    compiled = files()
    assert compiled
    events = run(micro(**SMALL, training__compile=True, seed=5), tmp_path / "other")
    assert [event for event in events if event["event"] == "step"]
    assert files() == compiled
    first, plain = RunDirectory(tmp_path / "run"), micro(**SMALL)
    assert first.config().training.compile is True
    assert not plain.training.compile
