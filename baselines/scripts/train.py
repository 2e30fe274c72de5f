"""Compose a baseline from configuration groups, and train it as an ordinary StackWise run.

    python scripts/train.py model=encoder/bert_family/tiny
    python scripts/train.py model=decoder/gpt2_family/tiny training=blockwise model.d_model=256
    python scripts/train.py --config-name=experiments/bert_reproduction/bert_base_glue
    python scripts/train.py --multirun model=encoder/bert_family/tiny,decoder/llama_family/tiny seed=0,1,2

Hydra's options work as ever: `--cfg job` prints what is composed, `--help` lists the groups, `--multirun` sweeps. All
runs share the store `runs/store`, so none trains a stage that another one has trained.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from baselines.compose import CONFIGS, configuration, refusal, register, run_name, suites
from stackwise.cli.app import explain
from stackwise.cli.commands.run import carry_out
from stackwise.cli.options import RUNS, Choice
from stackwise.cli.output import note, open_streams, say_all
from stackwise.cli.tables import suite_tables
from stackwise.errors import InterruptedRun, StackWiseError
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.suites import run_suites

FULL_ERROR = "HYDRA_FULL_ERROR"

_full = os.environ.get(FULL_ERROR, "0") not in ("", "0")
"""Whether the user wants tracebacks."""
_codes: list[int] = []
"""The exit code of each job of this command: Hydra keeps none."""


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def train(composed: DictConfig) -> None:
    """One job: a run, from its first stage to its report; or on from where it was."""
    job = HydraConfig.get()
    overrides = _overrides(job.overrides.task)
    options = [f"--config-name={job.job.config_name}"] if job.job.config_name != "config" else []
    command = shlex.join(["python", sys.argv[0], *options, *overrides])
    try:
        asked = suites(composed)
        config = configuration(composed, run_name(job.runtime.choices, overrides))
        run = RunDirectory(Path(composed.run) if composed.run else RUNS / config.name)
        carry_out(Choice(config, run, "the composed configuration", ()), as_json=False, command=command)
        result: dict[str, Any] = {"run": str(run.path.resolve()), "evaluation": run.evaluation()}
        if asked is not None:
            result["suites"] = run_suites(run, None, asked, note)
            say_all(suite_tables(result["suites"]))
        (Path(job.runtime.output_dir) / "result.json").write_text(json.dumps(result, indent=2))
    except (KeyboardInterrupt, InterruptedRun):
        raise  # the whole command ends, not one job of a sweep
    except (StackWiseError, OmegaConfBaseException) as error:
        if _full:
            raise
        _codes.append(explain(refusal(error) if isinstance(error, OmegaConfBaseException) else error))


def _overrides(overrides: Any) -> list[str]:
    """As they were typed: `${…}` in them is the configuration's, not Hydra's."""
    return cast(list[str], OmegaConf.to_container(overrides, resolve=False))


def main() -> int:
    """The command; returns its exit code, which is StackWise's."""
    os.environ[FULL_ERROR] = "1"  # Hydra then raises; else it prints its own report, and leaves with 1 whatever it was
    open_streams()
    register()
    try:
        train()
    except (HydraException, OmegaConfBaseException) as error:
        if _full:
            raise
        return explain(refusal(error))
    except BaseException as error:
        return explain(error, debug=_full)
    return max(_codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
