"""What the steps share: the command `stackwise`, printed and run."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CONFIG = str(Path(__file__).with_name("gpt2.yaml"))
STAGES, FUSED = "runs/stages", "runs/fused"


def stackwise(*words: str, settings: Sequence[str] = ()) -> None:
    """Run a command in the present directory; where it fails, end with its exit code (it has said why).

    Args:
        words: Its arguments.
        settings: KEY=VALUE of the configuration.
    """
    words += tuple(word for setting in settings for word in ("-o", setting))
    print("$", shlex.join(["stackwise", *words]), flush=True)
    code = subprocess.run([sys.executable, "-m", "stackwise", *words], check=False).returncode
    if code:
        raise SystemExit(code)
