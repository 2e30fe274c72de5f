"""The processes that a launcher started this command in: torchrun, mpirun (Open MPI, MPICH), srun; by the environment.

Rank 0 drives the run. Every other process only starts and watches its rank's workers (`hosts.py`).
"""

from __future__ import annotations

import itertools
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from stackwise.errors import UsageError

HERE = "127.0.0.1"
PORTS = range(15000, 30000)
"""Where a launcher names no port: one of these, by the job's id; below those that a system gives out by itself."""

BRACKETS = 8  # in a name of hosts: it is read bracket by bracket


@dataclass(frozen=True)
class Launch:
    """One process among those that a launcher started.

    Args:
        launcher: Its name, for people.
        rank: Which process this is, from 0.
        size: How many there are.
        local_rank: Which of those on this host, from 0: its GPU.
        address: The host of rank 0.
        port: Where rank 0 is reached by the others.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    address: str
    port: int


@dataclass(frozen=True)
class _Names:
    """The variables that a launcher sets."""

    launcher: str
    rank: str
    size: str
    local_rank: str
    job: tuple[str, ...]  # what tells this start from others
    local_size: str | None = None
    nodes: str | None = None  # how many hosts there are
    hosts: str | None = None  # a list of them, the one of rank 0 first


_LAUNCHERS = {  # by the variable that only it sets; mpirun may itself start its daemons by srun, so Slurm comes last
    "TORCHELASTIC_RUN_ID": _Names("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", (), local_size="LOCAL_WORLD_SIZE"),
    "OMPI_COMM_WORLD_RANK": _Names(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
        local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "SLURM_STEP_ID": _Names(  # of `srun`; a batch script's own shell has no step
        "srun",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        ("SLURM_JOB_ID", "SLURM_STEP_ID"),
        nodes="SLURM_STEP_NUM_NODES",
        hosts="SLURM_STEP_NODELIST",
    ),
    "PMI_RANK": _Names(
        "mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("PMI_JOBID", "PMI_ID"), local_size="MPI_LOCALNRANKS"
    ),
}


def launched(port: int | None, environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The place of this process among those of a launcher; None: it was started alone.

    Args:
        port: `parallel.port`; None: by what the launcher says.
        environment: Of this process.

    Raises:
        UsageError: The launcher does not say where rank 0 is, or says what is no number.
    """
    names = next((names for variable, names in _LAUNCHERS.items() if variable in environment), None)
    if names is None or _number(names, names.size, environment, 1) == 1:
        return None
    rank, size = _number(names, names.rank, environment), _number(names, names.size, environment)
    local_rank = _number(names, names.local_rank, environment, 0)
    if not 0 <= rank < size:
        raise UsageError(f"{names.launcher}: {names.rank}={rank} is not below {names.size}={size}")
    return Launch(
        names.launcher, rank, size, local_rank, _address(names, size, environment), port or _port(names, environment)
    )


def _number(names: _Names, variable: str, environment: Mapping[str, str], default: int | None = None) -> int:
    text = environment.get(variable)
    if text is None and default is not None:
        return default
    if text is None or not text.isascii() or not text.isdigit():
        raise UsageError(
            f"{names.launcher}: {variable} is {'not set' if text is None else 'no number'}",
            hint=f"start every rank by {names.launcher} itself, or none of its variables set",
        )
    return int(text)


def _address(names: _Names, size: int, environment: Mapping[str, str]) -> str:
    if address := environment.get("MASTER_ADDR"):
        return address
    one_host = names.local_size is not None and _number(names, names.local_size, environment, 0) == size
    if one_host or (names.nodes is not None and _number(names, names.nodes, environment, 0) == 1):
        return HERE
    if names.hosts is not None and (hosts := environment.get(names.hosts)):
        return (named_hosts(hosts) or [hosts])[0]
    raise UsageError(
        f"{names.launcher}: the ranks are on several hosts, and nothing says which is that of rank 0",
        hint="set MASTER_ADDR to its name in the environment of every rank (mpirun -x MASTER_ADDR=HOST …)",
    )


def named_hosts(hosts: str, most: int = 1) -> list[str]:
    """A list of hosts as Slurm writes it: `gpu[07-09,12]-ib,login` is gpu07-ib and others.

    Args:
        most: No more than one above this many are listed: a range may be of any length.
    """
    names: list[str] = []
    for group in re.split(r",(?![^\[]*\])", hosts):
        few = group.count("[") <= BRACKETS
        names += itertools.islice(_expanded(group) if few else [group], most + 1 - len(names))
    return names


def _expanded(group: str) -> Iterator[str]:
    before, bracket, rest = group.partition("[")
    if not bracket:
        yield group
        return
    inside, _, after = rest.partition("]")
    for part in inside.split(","):
        first, _, last = part.partition("-")
        is_range = re.fullmatch(r"[0-9]{1,9}-[0-9]{1,9}", part) is not None
        for number in range(int(first), int(last) + 1) if is_range else [first]:
            yield from (f"{before}{number:0>{len(first)}}{tail}" for tail in _expanded(after))


def _port(names: _Names, environment: Mapping[str, str]) -> int:
    if "MASTER_PORT" in environment:
        port = _number(names, "MASTER_PORT", environment)
        return port + 1 if names.launcher == "torchrun" else port  # torchrun itself listens at its own
    job = " ".join(environment.get(variable, "") for variable in names.job)
    return PORTS[zlib.crc32(job.encode()) % len(PORTS)]
