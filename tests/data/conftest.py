"""Corpora of real text on disk, and settings whose cache is a test's own."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stackwise.config import DataConfig

FOREIGN = "Straße in 東京: «être ou ne pas être» 🙂 — ñandú, Ёлка, שלום\n"


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., DataConfig]:
    def make(*paths: Path | str, **more: Any) -> DataConfig:
        return DataConfig(paths=[str(path) for path in paths], cache_dir=str(tmp_path / "cache"), **more)

    return make


@pytest.fixture(scope="session")
def library_texts() -> list[str]:
    """Sources of some packages of the standard library: about 45 documents, 0.8 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for name in ("json", "email", "logging", "importlib") for file in sorted((root / name).glob("*.py"))]
    return [text for file in files if (text := file.read_text(encoding="utf-8"))]


def written(folder: Path, texts: list[str]) -> Path:
    """A folder of these texts, some deeper, with text beyond ASCII."""
    for number, text in enumerate(texts):
        file = folder / f"part{number % 3}" / f"{number:03}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + FOREIGN * (number % 2), encoding="utf-8")
    return folder


@pytest.fixture
def corpus(tmp_path: Path, library_texts: list[str]) -> Path:
    """A folder of real sources."""
    return written(tmp_path / "corpus", library_texts)


def all_text(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def documents_of(split: Any, decode: Callable[[Any], str]) -> list[str]:
    """A split's documents, decoded, without their separators."""
    ends = [*split.documents[1:], split.n_tokens]
    return [decode(split.tokens[a : b - 1]) for a, b in zip(split.documents, ends, strict=True)]
