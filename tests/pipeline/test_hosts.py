"""Three hosts on this machine: network namespaces on a bridge, each with a name and a store of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stackwise.config.yaml_files import dump
from stackwise.pipeline.run import RunDirectory, status
from stackwise.store import ActivationStore
from tests.conftest import Micro, run
from tests.pipeline.test_modes import committed
from tests.pipeline.test_run import weights

HOSTS, BRIDGE = ("swh0", "swh1", "swh2"), "swhbr"
SETTINGS: dict[str, Any] = {"training__batch_size": 2, "training__accumulation": 6, "training__checkpoint_steps": 5}


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


def without_network() -> None:
    for host in HOSTS:
        ip("netns", "del", host)
    ip("link", "del", BRIDGE)


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """A bridge, and on it three hosts: 10.77.0.1 to 10.77.0.3."""
    if shutil.which("ip") is None or os.geteuid() != 0 or not ip("netns", "add", HOSTS[0]):
        pytest.skip("network namespaces cannot be made here")
    ready = ip("link", "add", BRIDGE, "type", "bridge") and ip("link", "set", BRIDGE, "up")
    for number, host in enumerate(HOSTS):
        inside = ("-n", host)
        ready = ready and (number == 0 or ip("netns", "add", host))
        ready = ready and ip("link", "add", f"{host}v", "type", "veth", "peer", "name", "eth0", "netns", host)
        ready = ready and ip("link", "set", f"{host}v", "master", BRIDGE, "up")
        ready = ready and ip(*inside, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
        ready = ready and ip(*inside, "link", "set", "eth0", "up") and ip(*inside, "link", "set", "lo", "up")
    try:
        if not ready:
            pytest.skip("no bridge between network namespaces can be made here")
        yield
    finally:
        without_network()


def started(
    config: Path, directory: Path, meeting: int, *more: str, hosts: tuple[str, ...] = HOSTS
) -> list[subprocess.Popen[str]]:
    """The same command on each host, as srun gives it."""
    ranks = []
    for rank, host in enumerate(hosts):
        numbers = {"PROCID": rank, "STEP_NUM_TASKS": 3, "LOCALID": 0, "STEP_ID": 0, "STEP_NUM_NODES": 3, "JOB_ID": 7}
        # A template that hosts shared would fork all workers on the first of them.
        here = {key: value for key, value in os.environ.items() if key != "STACKWISE_TEMPLATES"}
        said = {f"SLURM_{name}": str(number) for name, number in numbers.items()}
        said |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": str(meeting), "GLOO_SOCKET_IFNAME": "eth0"}
        named = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "sh"]
        command = [*named, sys.executable, "-m", "stackwise", "run", str(config), "--run", str(directory), *more]
        ranks.append(
            subprocess.Popen(command, env=here | said, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    return ranks


def until(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def goes_on(directory: Path, ranks: list[subprocess.Popen[str]]) -> None:
    """Wait for the next checkpoint."""
    before = sorted(directory.glob("checkpoints/*/step-*"))
    until(lambda: sorted(directory.glob("checkpoints/*/step-*")) != before or ranks[0].poll() is not None)
    assert ranks[0].poll() is None


def slowed(host: str, rate: str) -> int:
    """Let a host's link carry no more, either way; how many packets that kept waiting since it was last said."""
    waited = 0
    for place in ((["tc"], f"{host}v"), (["tc", "-n", host], "eth0")):
        command, device = place
        told = subprocess.run([*command, "-s", "qdisc", "show", "dev", device], capture_output=True, text=True).stdout
        waited += sum(map(int, re.findall(r"qdisc tbf.*?overlimits (\d+)", told, re.DOTALL)))
        slow = ["tbf", "rate", rate, "burst", "16kb", "latency", "400ms"]
        done = subprocess.run([*command, "qdisc", "replace", "dev", device, "root", *slow], capture_output=True)
        if done.returncode:
            pytest.skip("this kernel has no tbf to slow a link with")
    return waited


@pytest.mark.stress
def test_hosts_with_stores_of_their_own_and_a_link_that_is_slow_and_drops(
    network: None, micro: Micro, tmp_path: Path
) -> None:
    """For a moment: the run goes on. For good: one line within `parallel.timeout`; the same command goes on later."""
    steps = {"training__steps": 300}
    config = micro(**SETTINGS, **steps, store__path=str(tmp_path / "stores" / "{host}"), parallel__timeout=15.0)
    path, directory = tmp_path / "config.yaml", tmp_path / "run"
    path.write_text(dump(config))
    ranks = started(path, directory, 29741)
    until(lambda: list(directory.glob("checkpoints/*/step-*")))
    slowed("swh2", "2mbit")
    goes_on(directory, ranks)
    assert slowed("swh2", "1gbit") > 100
    ip("link", "set", "swh2v", "down")
    time.sleep(3)
    ip("link", "set", "swh2v", "up")
    goes_on(directory, ranks)
    ip("link", "set", "swh2v", "down")
    begun = time.monotonic()
    said = [rank.communicate(timeout=120)[1] for rank in ranks[:2]]
    assert time.monotonic() - begun < 60
    ip("link", "set", "swh2v", "up")
    said.append(ranks[2].communicate(timeout=120)[1])
    assert all(rank.returncode for rank in ranks), said
    assert not any("Traceback" in text for text in said), said
    assert "rank 2" in said[0].strip().splitlines()[-2] + said[0].strip().splitlines()[-1], said[0]
    ranks = started(path, directory, 29742)
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], said
    state = status(RunDirectory(directory))
    assert (state["state"], state["ranks"]) == ("done", 3)
    grouped = {"training__row_groups": 24}
    run(micro(**SETTINGS, **steps, **grouped), tmp_path / "alone")
    assert weights(directory) == weights(tmp_path / "alone")
    # Two hosts change places: each has the rows that the other is to have, and they come over the wire.
    ranks = started(path, directory, 29743, "-o", "stages.1.training.steps=20", hosts=(HOSTS[0], HOSTS[2], HOSTS[1]))
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], said
    assert "lacks rows" not in (directory / "events.jsonl").read_text()
    run(micro(**SETTINGS, **steps, **grouped, stages={1: {"training": {"steps": 20}}}), tmp_path / "alone")
    assert weights(directory) == weights(tmp_path / "alone")
    kept: list[set[str]] = []
    for host in HOSTS:
        with ActivationStore(tmp_path / "stores" / host, create=False) as store:
            assert store.verify()["damaged"] == []
            kept.append({info.id for info in store.boundaries()})
            assert all(store.stage(stage.recipe) for stage in committed(tmp_path / "alone"))
    with ActivationStore(tmp_path / "alone" / "store", create=False) as store:
        whole = {info.id for info in store.boundaries()}
    everywhere = set.intersection(*kept)  # of held-out rows
    assert sorted(name for names in kept for name in names - everywhere) == sorted(whole - everywhere)
