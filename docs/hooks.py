"""Pages of the site that are made when it is built (mkdocs: `hooks`)."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from stackwise.config.yaml_files import commented

INTRODUCTION = """# All settings

What `stackwise init --preset micro` writes: every setting with its meaning, its kinds and its default.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference of all settings, from the configuration's own descriptions."""
    text = f"{INTRODUCTION}\n```yaml\n{commented('micro')}\n```\n"
    files.append(File.generated(config, "settings.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write a line's end that is kept (a backslash behind code, as GitHub reads it) as this generator reads it."""
    return re.sub(r"(?m)^(`[^`\n]+`)\\$", r"\1<br>", markdown)
