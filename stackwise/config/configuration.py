"""The configuration that users hold: the settings, how they are read, and that they fit each other."""

from __future__ import annotations

from typing import Any, Self

from stackwise.config.checks import faults
from stackwise.config.loading import load, resolve
from stackwise.config.presets import preset_path
from stackwise.config.schema import Settings
from stackwise.errors import ConfigError


class StackWiseConfig(Settings):
    """The whole configuration of a run."""

    @classmethod
    def from_yaml(cls, path: str, overrides: dict[str, Any] | None = None) -> Self:
        """Read a YAML file; every fault of it is reported at once.

        Args:
            path: The file.
            overrides: Dotted keys and their values, applied on top.

        Raises:
            ConfigError: Unknown keys, wrong types, values out of range, settings that contradict each other.
        """
        return load(cls, path, overrides or {})

    @classmethod
    def from_preset(cls, name: str, overrides: dict[str, Any] | None = None) -> Self:
        """One of the built-in configurations.

        Raises:
            UsageError: No preset has that name.
            ConfigError: An override is faulty.
        """
        return load(cls, str(preset_path(name)), overrides or {}, source=f"preset {name}")

    def validate(self) -> Self:  # type: ignore[override]
        """Check that the settings fit each other.

        Raises:
            ConfigError: They do not; every fault is named.
        """
        resolve(self)
        if found := faults(self):
            raise ConfigError([f"{key}: {text}" for key, text in found])
        return self
