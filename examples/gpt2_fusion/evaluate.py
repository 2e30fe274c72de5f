"""Step 4: held-out figures by depth, the runs side by side, a continued prompt, and the model for transformers.

python evaluate.py [PROMPT]
"""

import sys

from steps import FUSED, STAGES, stackwise

if __name__ == "__main__":
    prompt = sys.argv[1] if len(sys.argv) > 1 else "def add(a, b):"
    stackwise("eval", "--run", FUSED)
    stackwise("compare", STAGES, FUSED)
    stackwise("generate", prompt, "--run", FUSED)
    stackwise("export", "--run", FUSED, "--format", "hf", "--out", "exported")
