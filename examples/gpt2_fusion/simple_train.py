"""Step 2: the stages, one after the other, each on the activations that the one below has left in the store.

python simple_train.py [KEY=VALUE…]            training.steps=100: any setting of gpt2.yaml
"""

import sys

from steps import CONFIG, STAGES, stackwise

if __name__ == "__main__":
    stackwise("run", CONFIG, "--run", STAGES, settings=sys.argv[1:])
