"""What a job asks a batch system for: nodes, ranks of each, GPUs, limits; as submitit names it."""

from __future__ import annotations

import re
import socket
from typing import Any, Literal

from stackwise.config import StackWiseConfig
from stackwise.config.fields import changed
from stackwise.errors import UsageError
from stackwise.pipeline.runner.launch import named_hosts
from stackwise.text import check_plain
from stackwise.words import plural

BatchSystem = Literal["slurm", "local", "ray"]
OPTION = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")  # the name of an option of sbatch

USED = {"local": ("minutes", "gpus"), "ray": ("cpus", "gpus")}
"""What of `slurm.*` the other batch systems read."""


def unused_resources(config: StackWiseConfig, engine: BatchSystem) -> str | None:
    """A line that names the settings of `slurm.*` that were given and that this batch system has no use for."""
    names = [name for name in changed(config.slurm) if name not in USED.get(engine, (name,))]
    if not names:
        return None
    return f"slurm.{', '.join(names)}{': unused,' if len(names) > 1 else ' is unused:'} --engine is {engine}"


def resources(config: StackWiseConfig, engine: BatchSystem) -> dict[str, Any]:
    """What a job asks for, as submitit names it.

    Raises:
        UsageError: Nodes, GPUs and `parallel.*` do not go together, or a string would not stay one in a job's script.
    """
    slurm, ranks = config.slurm, config.parallel.ranks
    if engine == "ray":
        gpus = ranks if slurm.gpus is None and ranks > 1 else slurm.gpus  # None: one, where the cluster has some
        return {"cpus": slurm.cpus, "gpus": gpus if config.device != "cpu" else 0, "gpu": config.device != "cpu"}
    if engine == "local":
        return {"timeout_min": slurm.minutes, "gpus_per_node": _gpus(config, ranks)}
    for key in slurm.parameters:
        if not OPTION.fullmatch(check_plain(key, "slurm.parameters")):
            raise UsageError(f"slurm.parameters: {key!r} is no option of sbatch", hint="as in {constraint: nvme}")
    extra = {key.replace("_", "-"): value for key, value in slurm.parameters.items()}
    if slurm.nodes > 1:
        _check_nodes(config)
    parameters: dict[str, Any] = {
        "timeout_min": slurm.minutes,
        "nodes": slurm.nodes,
        # On one node the job's command starts its ranks itself; on several srun does, a task each.
        "tasks_per_node": ranks // slurm.nodes if slurm.nodes > 1 else 1,
        "gpus_per_node": _gpus(config, ranks // slurm.nodes) or None,
        "cpus_per_task": slurm.cpus,
        "mem_gb": slurm.memory_gb,
        "slurm_partition": slurm.partition,
        "slurm_nodelist": slurm.nodelist or socket.gethostname().split(".")[0],
        "slurm_account": slurm.account,
        "slurm_qos": slurm.qos,
        "slurm_signal_delay_s": slurm.signal_seconds,
        # What depends on a job that failed leaves the queue, and a preempted job comes back to it.
        "slurm_additional_parameters": {"kill-on-invalid-dep": "yes", "requeue": True} | extra,
    }
    values = {key: value for key, value in parameters.items() if value is not None}
    for key, value in (values | extra).items():
        if isinstance(value, str):  # a line of the script each
            check_plain(value, f"slurm.{key.removeprefix('slurm_')}")
    return values


def _gpus(config: StackWiseConfig, ranks: int) -> int:
    """GPUs of a node that has so many ranks: one each.

    Raises:
        UsageError: `slurm.gpus` says otherwise; for a single rank it may.
    """
    gpus = config.slurm.gpus
    if gpus is None:
        return ranks if config.device != "cpu" else 0
    if gpus and ranks > 1 and gpus != ranks:
        raise UsageError(
            f"slurm.gpus: {plural(gpus, 'GPU')} a node, and a node has {ranks} of the {config.parallel.ranks} ranks of "
            "parallel.*",
            hint=f"a GPU for each: slurm.gpus={ranks}; or other numbers in parallel.* and slurm.nodes",
        )
    return gpus


def _check_nodes(config: StackWiseConfig) -> None:
    """Raises UsageError: a job cannot have several nodes so."""
    nodes, ranks, hosts = config.slurm.nodes, config.parallel.ranks, config.slurm.nodelist
    if ranks % nodes:
        near = [number for number in range(1, ranks + 1) if ranks % number == 0]
        below = max(number for number in near if number < nodes)
        above = [str(number) for number in near if number > nodes][:1]
        raise UsageError(
            f"slurm.nodes: {nodes} nodes for {plural(ranks, 'rank')} of parallel.*, and each node has as many as any",
            hint=f"nearest that divide: {' and '.join([str(below), *above])}; or other numbers in parallel.*",
        )
    if "{" not in (config.store.path or ""):
        raise UsageError(
            f"store.path: a job is on {nodes} nodes (slurm.nodes), and a store is on one",
            hint="give each node its own: a path with {host} or {rank} in it, on a local disk of every node",
        )
    if hosts is None:
        raise UsageError(
            "slurm.nodelist: with several nodes (slurm.nodes) it names them, as gpu[01-04]",
            hint="the first has the run's store, so all jobs of a run begin on the same ones",
        )
    if len(names := named_hosts(check_plain(hosts, "slurm.nodelist"), most=nodes)) != nodes:
        count = f"more than {nodes}" if len(names) > nodes else str(len(names))
        raise UsageError(f"slurm.nodelist: {hosts!r} names {count} nodes, and slurm.nodes is {nodes}")
