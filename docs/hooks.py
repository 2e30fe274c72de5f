"""Pages of the site that are made when it is built (mkdocs: `hooks`)."""

from __future__ import annotations

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from stackwise.config.presets import commented

INTRODUCTION = """# All settings

What `stackwise init --preset micro` writes: every setting with its meaning, its kinds and its default.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference of all settings, from the configuration's own descriptions."""
    text = f"{INTRODUCTION}\n```yaml\n{commented('micro')}\n```\n"
    files.append(File.generated(config, "settings.md", content=text))
    return files
