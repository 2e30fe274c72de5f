"""How a stage holds its blocks: their precision, and the adapters on them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.precision import holds_trunk, stack_adapters, stack_precision, trunk_precision

ADAPTER = "adapter."


def adapter_part(block: str) -> str:
    """The name of a block's adapters as a part of their own."""
    return f"{ADAPTER}{block}"


@dataclass(frozen=True)
class AdapterSize:
    """Some adapters on the layers of a block: their name, rank and alpha."""

    name: str
    rank: int
    alpha: float


@dataclass(frozen=True)
class Holding:
    """How a stage holds a block.

    Args:
        precision: By its canonical name; full: as the run computes. Weights in a narrow format are packed where they
            do not train.
        adapters: Those on it.
    """

    precision: str = "full"
    adapters: tuple[AdapterSize, ...] = ()

    def plain(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {"precision": self.precision, "adapters": [asdict(size) for size in self.adapters]}

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> Holding:
        """The inverse of `plain`."""
        return cls(data["precision"], tuple(AdapterSize(**size) for size in data["adapters"]))


PLAIN = Holding()


def holding(config: StackWiseConfig, home: int, top: int, trains: bool) -> Holding:
    """How stage `top` holds the blocks that were new with stage `home`.

    Args:
        config: The configuration.
        home: The one stage.
        top: The other.
        trains: Whether the blocks, or else their adapters, train. Under a frozen trunk they then train as they did.
    """
    qlora = config.training.progressive.trunk_strategy == "qlora"
    standing = home < top and holds_trunk(config) and (qlora or not trains)
    precision = trunk_precision(config, home) if standing else stack_precision(config, home)
    adapters = stack_adapters(config, home, min(max(home, top), config.n_sections - 1))
    return Holding(precision, tuple(AdapterSize(name, *sizes) for name, sizes in adapters.items()))
