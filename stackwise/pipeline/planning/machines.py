"""Machines that a run can be planned for, as plain data; and how a user describes another one."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from stackwise import files
from stackwise.config.yaml_files import parse_yaml
from stackwise.errors import UsageError

GB, TB = 10**9, 10**12
AUTO = "auto"
REACHED = 0.5
"""Share of a card's rated products that training is taken to reach, where nothing was measured."""


@dataclass(frozen=True)
class Disk:
    """A disk: bytes a second each way, and bytes; what is not known is taken to be a data-centre NVMe drive."""

    read: float = 7 * GB
    write: float = 5 * GB
    size: float = 15 * TB

    @property
    def endurance(self) -> float:
        """Bytes that it is rated to take: its size a day, for five years, as drives for mixed use commonly are."""
        return 5 * 365 * self.size


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of a machine.

    Args:
        memory: Bytes of the device.
        flops, fp8: Products a second, dense, in the usual precision and in 8 bits; `reached` of them are training's.
        bandwidth: Bytes a second of the device's memory.
        host: Bytes a second between host and device, one way.
        ram: Bytes of the host's memory.
    """

    name: str
    kind: str  # "cuda" or "cpu"
    memory: float
    flops: float  # bf16 on a GPU, fp32 on a CPU
    bandwidth: float
    host: float
    source: str
    fp8: float = 0.0  # 0: products in 8 bits are carried out as wider ones
    ram: float = 128 * GB
    disk: Disk = Disk()
    reached: float = REACHED
    base: float = 2.5 * GB  # bytes of host memory that a worker takes for itself

    @property
    def rate(self) -> float:
        """Products a second that training is taken to reach."""
        return self.flops * self.reached


def _card(name: str, memory: float, tflops: tuple[float, float], bandwidth: float, host: float, source: str) -> Machine:
    flops, fp8 = (number * 1e12 for number in tflops)
    return Machine(name, "cuda", memory * GB, flops, bandwidth * TB, host * GB, source, fp8)


PCIE4, PCIE5 = 25.0, 50.0  # GB/s one way of 16 lanes, about what copies of pinned memory reach

MACHINES = {
    machine.name: machine
    for machine in (
        _card("h200", 141, (989, 1979), 4.8, PCIE5, "NVIDIA H200 data sheet (SXM)"),
        _card("h100", 80, (989, 1979), 3.35, PCIE5, "NVIDIA H100 data sheet (SXM)"),
        _card("b200", 180, (2250, 4500), 8.0, PCIE5, "NVIDIA HGX B200 data sheet"),
        _card("a100-80", 80, (312, 0), 2.0, PCIE4, "NVIDIA A100 data sheet (80 GB SXM)"),
        _card("a100-40", 40, (312, 0), 1.555, PCIE4, "NVIDIA A100 data sheet (40 GB SXM)"),
        _card("l40s", 48, (362, 733), 0.864, PCIE4, "NVIDIA L40S data sheet"),
        _card("a6000", 48, (155, 0), 0.768, PCIE4, "NVIDIA RTX A6000 data sheet"),
        _card("rtx4090", 24, (165, 330), 1.008, PCIE4, "NVIDIA Ada architecture paper (dense, fp32 sums)"),
        _card("rtx5090", 32, (210, 419), 1.792, PCIE5, "NVIDIA Blackwell RTX architecture paper (dense, fp32 sums)"),
        _card("rtx3090", 24, (71, 0), 0.936, PCIE4, "NVIDIA Ampere GA102 paper (dense, fp32 sums)"),
        Machine(
            "cpu", "cpu", 64 * GB, 1e12, 0.1 * TB, 20 * GB, "a server of 16 cores, assumed", ram=64 * GB, base=0.4e9
        ),
    )
}

EXAMPLE = "{name: mine, memory: 24GB, flops: 165T, bandwidth: 1TB/s, host: 25GB/s, ram: 64GB, disk: '7GB/s,4TB'}"
"""A description as a line that can be copied into a file."""


def find(name: str) -> Machine:
    """A machine by its name, or by the YAML file that describes it; `auto` is for `rates.this_machine`.

    Raises:
        UsageError: There is none of that name, or its description is faulty.
    """
    if name in MACHINES:
        return MACHINES[name]
    if name.endswith((".yaml", ".yml")):
        return described(Path(name))
    meant = difflib.get_close_matches(name, MACHINES, n=1)
    raise UsageError(
        f"--gpu {name}: there is no machine of that name" + (f"; did you mean {meant[0]}?" if meant else ""),
        hint=f"known: auto, {', '.join(MACHINES)}; or --gpu mine.yaml, a file such as {EXAMPLE}",
    )


def described(path: Path) -> Machine:
    """A machine from a user's YAML file.

    Raises:
        UsageError: It cannot be read, or says what no machine is.
    """
    try:
        values = parse_yaml(files.read_text(path), str(path))
    except (OSError, files.IrregularFile, UnicodeDecodeError) as error:
        raise UsageError(
            f"--gpu {path}: {getattr(error, 'strerror', None) or error}", hint=f"write {EXAMPLE}"
        ) from None
    required = {"memory": "", "flops": "", "bandwidth": "/s"}
    optional = {"host": "/s", "fp8": "", "ram": "", "disk": None, "name": None, "kind": None}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: it is no mapping", hint=f"write {EXAMPLE}")
    faults = [f"{key}: there is no such key" for key in values if key not in required | optional]
    faults += [f"{key}: it is missing" for key in required if key not in values]
    kind = values.get("kind", "cuda")
    if kind not in ("cuda", "cpu"):
        faults.append(f"kind: cuda or cpu, not {kind}")
    numbers: dict[str, float] = {}
    for key, per in (required | optional).items():
        if per is not None and key in values:
            try:
                numbers[key] = amount(str(values[key]), per)
            except ValueError as error:
                faults.append(f"{key}: {error}")
    if faults:
        raise UsageError(f"{path}: {'; '.join(faults)}", hint=f"write {EXAMPLE}")
    machine = Machine(
        name=str(values.get("name", path.stem))[:64],
        kind=str(kind),
        memory=numbers["memory"],
        flops=numbers["flops"],
        bandwidth=numbers["bandwidth"],
        host=numbers.get("host", PCIE4 * GB),
        source=str(path),
        fp8=numbers.get("fp8", 0.0),
        ram=numbers.get("ram", 128 * GB),
    )
    return replace(machine, disk=disk(str(values["disk"]), str(path))) if "disk" in values else machine


SMALLEST = 1e6
"""A size or rate that means something: a number without its unit is one that does not."""


def amount(text: str, per: str = "") -> float:
    """A size or rate in decimal units: 24GB, 7GB/s, 165T, 1B tokens.

    Raises:
        ValueError: It is none, or so small that its unit was left out.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?(?:e\d{1,2})?)\s*([kmgtpb]?)i?b?\s*(/s)?\s*", text.lower())
    scale = {"": 1, "b": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
    value = float(match[1]) * scale[match[2]] if match else 0.0
    if not match or not 0 < value < 1e24 or (match[3] and not per):
        raise ValueError(f"{text!r} is no {'rate, such as 7GB/s' if per else 'size, such as 24GB'}")
    if value < SMALLEST:
        raise ValueError(f"{text!r} is too small: its unit is missing, such as {text.strip()}G")
    return value


def disk(text: str, where: str = "--disk") -> Disk:
    """A disk in words: rates and a size with commas between: 7GB/s,15TB; with two rates the second is of writing.

    Raises:
        UsageError: It is none.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        rates = [amount(part, "/s") for part in parts if part.lower().endswith("/s")]
        sizes = [amount(part) for part in parts if not part.lower().endswith("/s")]
    except ValueError as error:
        raise UsageError(f"{where} {text}: {error}", hint="give rates and a size: 7GB/s,5GB/s,15TB") from None
    if len(rates) > 2 or len(sizes) > 1 or not parts:
        raise UsageError(f"{where} {text}: one or two rates and a size", hint="such as 7GB/s,15TB")
    known = Disk()
    read = rates[0] if rates else known.read
    return Disk(read, rates[1] if len(rates) > 1 else read if rates else known.write, sizes[0] if sizes else known.size)


def tokens(text: str) -> int:
    """A number of tokens: 1B, 300M, 1e9, 20000.

    Raises:
        UsageError: It is none.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?(?:e\d{1,2})?)\s*([kmbgt]?)\s*", text.lower())
    number = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}[match[2]] if match else 0.0
    if not 1 <= number < 1e18:
        raise UsageError(f"--tokens {text}: no number of tokens", hint="such as 1B, 300M, or 20000")
    return round(number)
