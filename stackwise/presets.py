"""The built-in configurations by name, from seconds on two cores to one H200 for months; files: `config/presets/`.

Apart from `config`, so that help that lists them costs no import of it.
"""

PRESETS = (
    "micro",
    "smoke",
    "demo",
    "stages",
    "finetune",
    "gpt2-small",
    "bert-base",
    "llama-1b",
    "llama-8b",
    "llama-70b",
)

DEFAULT_PRESET = "demo"
FINETUNE = "finetune"
"""The preset of a run from a pretrained model, where no other is named."""
