"""Runs that train on their own answers: resident, swapped, killed, with adapters, scored by a reward model."""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from stackwise import report
from stackwise.config import StackWiseConfig
from stackwise.config.kinds import SCORES, Score
from stackwise.config.loading import build
from stackwise.data.tokenizer import bytes_tokenizer
from stackwise.errors import StackWiseError, UsageError
from stackwise.inference import Continuing, LoadedModel, sample_causal
from stackwise.inference.answers import Answers, draw_answers, likelihoods
from stackwise.pipeline.committed.figures import make_scorer
from stackwise.pipeline.committed.load import load_model
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.teacher import score_model
from stackwise.store import ActivationStore
from tests.conftest import raises_naming, run
from tests.pipeline.storm import killed
from tests.pipeline.test_run import named, weights
from tests.pretrained.models import make

SEPARATOR = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make("llama", directory, vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=2)
    (directory / "tokenizer.json").write_text(bytes_tokenizer().json)
    return directory


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "+" * (n % 4) + f"{n} = "}) + "\n" for n in range(30)))
    return path


def _settings(model: Path, prompts: Path, objective: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    kl = {"coefficient": 0.1, "target": 0.5, "horizon": 40}
    common = {
        "init__weights": str(model),
        "data__paths": [str(prompts)],
        "data__held_out": 0.2,
        "training__objective": {"name": "ppo", "new_tokens": 6, "passes": 2, "kl": kl} | (objective or {}),
        "training__mode": "end_to_end",
        "training__windows": 2,
        "training__seq_len": 20,
        "training__batch_size": 4,
        "training__steps": 8,
        "training__checkpoint_steps": 2,
        "training__learning_rate": 1e-2,
    }
    return common | more


def _config(settings: dict[str, Any]) -> StackWiseConfig:
    return build(StackWiseConfig, {}, {key.replace("__", "."): value for key, value in settings.items()})


@pytest.fixture(scope="module")
def ppo(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    directory = tmp_path_factory.mktemp("ppo") / "run"
    return directory, run(_config(_settings(model, prompts)), directory)


def _records(directory: Path) -> list[dict[str, Any]]:
    recipes = [stage["recipe"] for stage in RunDirectory(directory).manifest()["stages"]]
    with ActivationStore(directory / "store", create=False) as store:
        committed = [store.stage(recipe, check=False) for recipe in recipes]
    return [one.record for one in committed if one is not None]


def test_phases_are_windows_and_the_penalty_goes_on(ppo: tuple[Path, list[Any]]) -> None:
    directory, events = ppo
    first, second = named(events, "rolled_out")
    assert first["rows"] == second["rows"] == 8, "4 steps of 4 rows, twice over each"
    assert first["kl"] == 0.0, "the policy begins as its reference"
    assert second["kl"] > 0
    assert second["coefficient"] == pytest.approx(0.1 * (1 - 0.2 * 8 / 40)), "a pure function of the phase before"
    assert [one["rollout"]["kl"] for one in _records(directory)] == [first["kl"], second["kl"]]
    steps = named(events, "step")
    assert {"policy", "values", "clipped", "moved"} <= set(steps[0]["terms"])
    evaluation = named(events, "done")[0]["evaluation"]
    assert evaluation["of"] == "answers"
    assert set(evaluation["figures"]) == {"score", "length", "ended", "kl"}
    assert evaluation["figures"]["kl"] > 0
    fill = named(events, "fill")[0]
    assert fill["after"].startswith(fill["before"])
    assert fill["before"].endswith(" = "), "a whole prompt"
    assert "score, held out" in report.write(RunDirectory(directory)).read_text()


def test_swapped_and_killed_it_is_the_same(
    ppo: tuple[Path, list[Any]], model: Path, prompts: Path, tmp_path: Path
) -> None:
    swapped = run(_config(_settings(model, prompts, training__swap="always")), tmp_path / "swapped")
    assert weights(tmp_path / "swapped") == weights(ppo[0])
    keys = ("score", "kl", "length", "ended", "coefficient")
    figures = [[event[key] for key in keys] for event in named(swapped, "rolled_out")]
    assert figures == [[event[key] for key in keys] for event in named(ppo[1], "rolled_out")]
    longer = _settings(model, prompts, training__steps=24)  # a kill at the first checkpoint has to come in time
    run(_config(longer), tmp_path / "whole")
    killed(_config(longer), tmp_path / "killed", 1)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.stress
def test_ranks_draw_and_train_as_one_process(model: Path, prompts: Path, tmp_path: Path) -> None:
    settings = _settings(model, prompts, training__accumulation=2)
    run(_config(settings), tmp_path / "alone")
    run(_config(settings | {"parallel__data": 2}), tmp_path / "ranks")
    assert weights(tmp_path / "ranks") == weights(tmp_path / "alone")


def _die_drawing(settings: dict[str, Any], directory: Path) -> None:
    """Run until a first chunk of the second phase's answers is there; then kill the workers, and this process."""

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "boundary" and event["stage"] == 1 and event["done"]:
            this = psutil.Process()
            for process in (*this.children(recursive=True), this):
                process.kill()

    Runner(_config(settings), RunDirectory(directory), observe).run()


@pytest.mark.stress
def test_killed_while_answers_are_drawn(model: Path, tmp_path: Path) -> None:
    """A kill costs a chunk of the second phase's answers: those that are published are not drawn again."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{n} = "}) + "\n" for n in range(600)))
    objective = {"new_tokens": 50, "passes": 1}
    more = {"training__seq_len": 64, "training__batch_size": 200, "training__steps": 4}
    settings = _settings(model, prompts, objective, **more)
    config = _config(settings)
    run(config, tmp_path / "whole")
    process = multiprocessing.get_context("spawn").Process(target=_die_drawing, args=(settings, tmp_path / "killed"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    events = run(config, tmp_path / "killed")
    begun = [event["done"] for event in named(events, "boundary") if event["stage"] == 1]
    assert begun[0] > 0, "it goes on behind the chunks that are there"
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_answers_are_drawn_from_the_policy(model: Path) -> None:
    """Prompts of several lengths at once are as each alone, and what is said of answers is transformers' word."""
    from transformers import AutoModelForCausalLM

    rack = load_model(str(model), torch.device("cpu"), lambda line: None)
    ours = LoadedModel(rack.front(), list(rack.modules()), True, rack.autocast, True)
    texts = ["1 = ", "+++12 = ", "++3 ="]
    lengths = torch.tensor([len(text) for text in texts])
    rows = torch.full((3, 16), SEPARATOR)
    for row, text in enumerate(texts):
        rows[row, : len(text)] = torch.tensor(list(text.encode()))
    greedy = draw_answers(ours, rows, lengths, 6, Continuing(stop_token_id=SEPARATOR))
    for row, length in enumerate(lengths.tolist()):
        alone = sample_causal(ours, rows[row, :length], 6, Continuing(stop_token_id=SEPARATOR))
        drawn = int(greedy.drawn_BS[row].sum())
        assert greedy.ids_BS[row, : length + drawn].tolist() == alone.tolist()[: length + drawn]
        assert greedy.prompts()[row] == list(texts[row].encode())
    sampled = draw_answers(ours, rows, lengths, 6, Continuing(temperature=1.0, seed=3, stop_token_id=SEPARATOR))
    said = likelihoods(ours, sampled)
    oracle: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        logits = oracle(sampled.ids_BS).logits.log_softmax(-1)
    expected = logits.gather(2, sampled.ids_BS.roll(-1, 1)[..., None]).squeeze(2) * sampled.before_BS
    torch.testing.assert_close(said, expected, atol=2e-5, rtol=0)


def test_a_reward_model_scores_a_policy_with_adapters(
    ppo: tuple[Path, list[Any]], model: Path, prompts: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{n} = ", "chosen": "aaaa", "rejected": "0000"} for n in range(20)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = _settings(model, pairs) | {"training__objective": "reward", "training__seq_len": 40}
    run(_config({k: v for k, v in settings.items() if k != "training__windows"}), tmp_path / "reward")
    score = {"score": {"name": "model", "path": str(tmp_path / "reward")}}
    settings = _settings(model, prompts, score, training__adapters={"rank": 2}, training__checkpoint_steps=None)
    events = run(_config(settings), tmp_path / "run")
    first, second = named(events, "rolled_out")
    assert np.isfinite([first["score"], second["score"]]).all()
    assert first["score"] != second["score"]
    assert first["kl"] == 0.0, "adapters begin as nothing"
    assert not named(run(_config(settings), tmp_path / "run"), "rolled_out"), "the same one is found again"
    other: Any = SimpleNamespace(tokenizer_id="another")
    with pytest.raises(UsageError, match="another tokenizer"):
        score_model(_config(settings), other)
    gone = {"score": {"name": "model", "path": str(tmp_path / "gone")}}
    with raises_naming(UsageError, "training.objective.score", tmp_path / "gone"):
        score_model(_config(_settings(model, prompts, gone)), other)
    with raises_naming(UsageError, "ppo", ppo[0]):
        score_model(_config(_settings(model, prompts, {"score": {"name": "model", "path": str(ppo[0])}})), other)


@pytest.mark.parametrize(
    ("given", "what"),
    [([1.0, float("nan")], "nan"), ([1.0], "1 scores for 2"), (["good", 1], "good"), (7, "int"), (None, "NoneType")],
)
def test_scores_that_are_no_numbers_are_told(given: Any, what: str) -> None:
    class Broken(Score):
        def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
            assert list(answers) == ["b", "bc"], "an answer without its end"
            return given  # type: ignore[no-any-return]

    SCORES.register(f"broken {what}")(Broken)
    rows = torch.tensor([[97, 98, SEPARATOR, SEPARATOR], [97, 98, 99, SEPARATOR]])
    answers = Answers.marked(rows, torch.tensor([1, 1]), 2, SEPARATOR)
    with pytest.raises(UsageError, match=what):
        make_scorer(Broken(), bytes_tokenizer(), torch.device("cpu"), whole=True)(answers)


@pytest.mark.parametrize(
    ("objective", "more", "what"),
    [
        ({"new_tokens": 0}, {}, "new_tokens"),
        ({"new_tokens": 20}, {}, "new_tokens"),
        ({"new_tokens": 14}, {}, "longest prompt"),
        ({}, {"init__weights": None, "data__tokenizer": "bytes"}, "init.weights"),
        ({}, {"training__mode": "layerwise"}, "end_to_end"),
        ({}, {"training__eval_every": 2}, "eval_every"),
        ({}, {"training__windows": "auto"}, "windows"),
        ({}, {"training__windows": 9}, "windows"),
        ({"score": {"name": "model", "path": "/nowhere"}}, {}, "nowhere"),
        ({"score": {"name": "pattern", "regex": "("}}, {}, "regular expression"),
    ],
)
def test_what_cannot_be_is_told(
    model: Path, prompts: Path, tmp_path: Path, objective: dict[str, Any], more: dict[str, Any], what: str
) -> None:
    with pytest.raises(StackWiseError, match=what) as caught:
        run(_config(_settings(model, prompts, objective) | more), tmp_path / "run")
    assert caught.value.exit_code in (UsageError("").exit_code, 2)
    assert not (tmp_path / "run" / "run.json").exists()
