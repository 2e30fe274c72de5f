"""Step 3: all blocks train together for a while, from the stages' weights: the same run with one more stage.

    python fuse.py [KEY=VALUE…]                    the same settings as in step 2, so that its stages are found

The stages of step 2 are in the store, so none of them trains again. What does not fit in memory together takes turns
between memory and disk (`training.memory`).
"""

import sys

from steps import CONFIG, FUSED, stackwise

FUSION = {"name": "gpt2-fused", "training.fusion.strategy": "trainable", "training.fusion.steps": "200"}

if __name__ == "__main__":
    keys = {setting.partition("=")[0] for setting in sys.argv[1:]}
    defaults = [f"{key}={value}" for key, value in FUSION.items() if key not in keys]
    stackwise("run", CONFIG, "--run", FUSED, settings=[*defaults, *sys.argv[1:]])
