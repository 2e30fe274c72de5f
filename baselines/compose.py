"""Between Hydra's composed configuration and StackWise's own: the defaults that go in, the settings that come out."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from stackwise.config import StackWiseConfig
from stackwise.config.fields import Section
from stackwise.config.kinds import Kind
from stackwise.config.loading import build, leaves
from stackwise.errors import NotFound, UsageError
from stackwise.pipeline.suites import SUITES, SuiteOptions
from stackwise.text import printable

CONFIGS = Path(__file__).parent / "configs"
STORE = "runs/store"
"""The store that all runs share unless told otherwise, so that none trains a stage that another one has."""

SHOWN, MOST_SHOWN = 28, 4
"""Letters of an override that a run's name shows; how many it shows."""


def register() -> None:
    """Let the configuration groups stand on StackWise's defaults, under the name `stackwise`."""
    ConfigStore.instance().store(name="stackwise", node=defaults())


def defaults() -> dict[str, Any]:
    """Every setting at its default. A choice is its name alone: a group that says another brings its own settings."""
    tree = _defaults(StackWiseConfig())
    tree["store"]["path"] = STORE
    return tree


def _defaults(section: Section) -> dict[str, Any]:
    return {name: _plain(getattr(section, name)) for name in type(section).model_fields}


def _plain(value: Any) -> Any:
    match value:
        case Kind():
            return value.name
        case Section():
            return _defaults(value)
        case list():
            return [_plain(item) for item in value]
    return value


def suites(composed: DictConfig) -> SuiteOptions | None:
    """The suites of tasks that follow the run; None: there are none.

    Raises:
        UsageError: There is no such suite, or its data is not said.
    """
    asked: Any = OmegaConf.to_container(composed.suites, resolve=True)
    names = tuple(asked["names"])
    for name in names:
        if name not in SUITES:
            raise UsageError(f"suites.names: there is no suite {name!r}", hint=_instead(str(name), SUITES))
    if "glue" in names and asked["task_path"] is None:
        raise UsageError("suites.task_path: GLUE's folder is not said", hint="for example suites.task_path=glue")
    path = None if asked["task_path"] is None else Path(asked["task_path"])
    if path is not None and not path.is_dir():
        raise NotFound(f"suites.task_path {path}: there is no such folder")
    options = SuiteOptions(names, (), tuple(asked["tasks"]), path, limit=asked["limit"], seeds=asked["seeds"])
    settings = dict(leaves(asked["settings"]))
    return dataclasses.replace(options, settings=settings, device=str(composed.device)) if names else None


def configuration(composed: DictConfig, name: str) -> StackWiseConfig:
    """The StackWise configuration that was composed.

    Args:
        composed: What Hydra composed.
        name: Of the run, where the configuration says none.

    Raises:
        UsageError: It is faulty; every fault is named.
        OmegaConfBaseException: An interpolation leads nowhere.
    """
    tree: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    for own in ("run", "suites"):
        tree.pop(own, None)
    if tree["data"]["paths"] is None:
        raise UsageError("data.paths: the text to train on is not said", hint="for example data.paths=[corpus.txt]")
    tree["name"] = tree["name"] or name
    # Only what differs is a setting that somebody made: a default is no opinion, and contradicts nothing.
    return build(
        StackWiseConfig,
        {"name": tree["name"]} | _differences(tree, _defaults(StackWiseConfig())),
        source="the composed configuration",
    )


def _differences(tree: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in tree.items():
        before = base.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := _differences(value, before):
                changed[key] = inner
        elif key not in base or value != before:
            changed[key] = value
    return changed


def run_name(choices: Mapping[str, str | None], overrides: Sequence[str]) -> str:
    """A name that the same groups and overrides always have: `bert_family-tiny-end_to_end-seed-1`.

    Args:
        choices: The option of each group.
        overrides: The command line's, as Hydra has them.
    """
    others = sorted(item for item in overrides if item.partition("=")[0] not in ("model", "training", "run", "name"))
    shown = [item for item in others if len(item) <= SHOWN and "/" not in item][:MOST_SHOWN]
    words = [*str(choices.get("model")).split("/")[-2:], str(choices.get("training")), *shown]
    if len(shown) < len(others):  # what is too long for a name still tells runs apart
        words.append(hashlib.sha256("\n".join(others).encode()).hexdigest()[:8])
    return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(words)).strip(".-_") or "baseline"


def refusal(error: Exception) -> UsageError:
    """What Hydra or OmegaConf refuse, in a line, and what there is instead."""
    text = printable(" ".join(str(error).split()))
    if option := re.search(r"Could not (?:find|load) '([^']+)'", text):
        group, _, name = option[1].partition("/")
        return UsageError(f"{group}={name}: there is no such option", hint=_instead(name, options(group)))
    if config := re.search(r"Cannot find primary config '([^']+)'", text):
        return UsageError(f"--config-name={config[1]}: there is none", hint=_instead(config[1], experiments()))
    if group_key := re.search(r"Could not override '([^']+)'\. No match in the defaults list", text):
        return UsageError(f"{group_key[1]}: there is no such group", hint=_instead(group_key[1], groups()))
    if key := re.search(r"Could not override '([^']+)'", text):
        return UsageError(f"{key[1]}: unknown key", hint=_key_instead(key[1]))
    if override := re.search(r"Error parsing override '([^']*)'", text):
        return UsageError(f"{override[1]}: cannot be read", hint="GROUP=OPTION, or KEY=VALUE such as seed=1")
    return UsageError(text[:300], hint="`--cfg job` prints what is composed; HYDRA_FULL_ERROR=1 shows the traceback")


def _key_instead(key: str) -> str:
    """What StackWise says of a key that Hydra does not have: a choice's settings are no part of the defaults."""
    tree: Any = None
    for name in reversed(key.split(".")):
        tree = {name: tree}
    try:
        build(StackWiseConfig, tree, source="")
    except UsageError as error:
        _, unknown, meant = str(error).partition(f"{key}: unknown key; ")
        if unknown and "the top level" not in meant:
            return meant
        if unknown or f"{key}: " not in str(error):  # a part of it is no section
            return _instead(key, [*(name for name, _ in leaves(defaults())), *groups()])
    return f"a setting of the choice {key.rpartition('.')[0]}: add it with +{key}=…"


def groups() -> list[str]:
    """The configuration groups."""
    return sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name != "experiments")


def options(group: str) -> list[str]:
    """The options of a group."""
    return _names(CONFIGS / group)


def experiments() -> list[str]:
    """Whole configurations, as `--config-name` takes them."""
    return [f"experiments/{name}" for name in _names(CONFIGS / "experiments")]


def _names(folder: Path) -> list[str]:
    files = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    return sorted(str(path) for path in files if not path.name.startswith("_"))  # those are parts of others


def _instead(name: str, names: Sequence[str]) -> str:
    begun = [full for full in names if full.startswith(name)]  # the first part of a path is what is remembered
    near = begun[:5] or difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names[:40])}"
