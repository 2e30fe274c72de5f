"""An optimizer and an objective from outside the package, in a file each: staged, swapped, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LION = '''
from typing import Any

import torch
from pydantic import Field

from stackwise.config.kinds import OPTIMIZERS, Optimizer


class Steps(torch.optim.Optimizer):
    def __init__(self, groups, beta):
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0})
        self.beta = beta

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    mean.lerp_(p.grad, 1 - self.beta)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(mean.sign(), alpha=group["lr"])


@OPTIMIZERS.register("lion")
class Lion(Optimizer):
    """Signs of a mean of gradients (arXiv 2302.06675, of one beta)."""

    beta: float = Field(0.9, description="decay of the mean")

    def state_bytes(self, blocks: int, rest: int) -> int:
        return 4 * (blocks + rest)

    def build(self, groups: list[dict[str, Any]]) -> Any:
        return Steps(groups, self.beta)
'''

SMOOTH = '''
from typing import Any

from pydantic import Field

from stackwise.config.kinds import OBJECTIVES, Objective


@OBJECTIVES.register("smooth")
class Smooth(Objective):
    """Masked diffusion, and beside it how far each position's vector is from a value that the data brings for it."""

    inputs = ("targets",)
    weight: float = Field(0.1, description="of the second term")

    def build(self, mask_token: int, vocab_size: int, seed: int) -> Any:
        from stackwise.batch import Term
        from stackwise.objectives import MaskDiffusionObjective

        weight = self.weight

        class Built(MaskDiffusionObjective):
            name, inputs = "smooth", ("targets",)

            def counts(self, batch):
                return super().counts(batch) | {"distance": batch.tokens_BS.numel()}

            def loss(self, outputs, batch):
                targets_BS = batch["targets"].float()
                distance = (outputs.x_BSD.float().mean(2) - targets_BS).square().sum()
                return super().loss(outputs, batch) | {"distance": Term(distance, targets_BS.numel(), weight)}

        return Built(mask_token)
'''

INT16 = '''
import numpy as np
import torch

from stackwise.registry import CODECS
from stackwise.store.codecs import ArraySpec, Codec


@CODECS.register("int16")
class Int16(Codec):
    """16-bit integers, with a scale for each position of each row."""

    stored, decoded = "int16", "float32"
    arrays = (ArraySpec("activations", "int16", per_feature=True), ArraySpec("scale", "float32", per_feature=False))

    def encode(self, x):
        y = torch.as_tensor(x).detach().to("cpu", torch.float32)
        scale = (y.abs().amax(dim=-1) / 32767).clamp(min=1e-30)
        return [(y / scale.unsqueeze(-1)).round().to(torch.int16).numpy(), scale.contiguous().numpy()]

    def decode(self, stored, out):
        out.copy_(torch.from_numpy(stored[0]).float() * torch.from_numpy(stored[1]).unsqueeze(-1))
'''

KINDS = {
    "int16": (INT16, ["store.codec=int16-zstd"]),
    "lion": (LION, ["training.optimizer={name: lion, beta: 0.8}"]),
    "smooth": (SMOOTH, ["training.objective={name: smooth, weight: 0.2}", "training.accumulation=2"]),
}


class Runs:
    """Runs of a preset with all kinds from outside at once, a file each."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.files = directory, {kind: directory / f"{kind}.py" for kind in KINDS}
        self.overrides = [override for _, overrides in KINDS.values() for override in overrides]
        for kind, file in self.files.items():
            file.write_text(KINDS[kind][0])
        rows = [
            {"input_ids": [(3 * i + j) % 7 for j in range(9)], "targets": [j % 3 for j in range(9)]} for i in range(400)
        ]
        (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(self, name: str, *overrides: str) -> list[str]:
        fixed = ["evaluation.samples=4", f"data.paths=[{self.directory}/rows.jsonl]", *self.overrides, *overrides]
        pairs = [word for override in fixed for word in ("-o", override)]
        return [sys.executable, "-m", "stackwise", "run", "--preset", "micro", "--run", name, *pairs]

    def environment(self) -> dict[str, str]:
        cache = str(self.directory / "cache")
        plugins = os.pathsep.join(map(str, self.files.values()))
        return {**os.environ, "STACKWISE_PLUGINS": plugins, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": cache}

    def run(self, name: str, *overrides: str) -> list[dict[str, Any]]:
        """Run to the end; the stages."""
        done = subprocess.run(
            self.command(name, *overrides), env=self.environment(), cwd=self.directory, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return self.stages(name)

    def stages(self, name: str) -> list[dict[str, Any]]:
        stages: list[dict[str, Any]] = json.loads((self.directory / name / "run.json").read_text())["stages"]
        return stages

    def kill_in_training(self, name: str, *overrides: str) -> None:
        """Kill everything of a run once its first stage has taken some steps."""
        process = subprocess.Popen(
            self.command(name, *overrides), env=self.environment(), cwd=self.directory, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        events, until = self.directory / name / "events.jsonl", time.monotonic() + 60
        while time.monotonic() < until and not (events.exists() and '"event": "checkpoint"' in events.read_text()):
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def actions(self, name: str) -> list[str]:
        """What would become of each stage, were it run again."""
        command = [*self.command(name), "--dry-run", "--json"]
        done = subprocess.run(command, env=self.environment(), cwd=self.directory, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines()]
        (plan,) = (event for event in events if event["event"] == "plan")
        return [stage["action"] for stage in plan["stages"]]


def weights(stages: list[dict[str, Any]]) -> list[str]:
    return [stage["weights"] for stage in stages]


def test_they_train_staged_swapped_killed_and_resumed(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    staged = runs.run("staged")
    assert [stage["state"] for stage in staged] == ["done"] * len(staged)
    whole = runs.run("whole", "training.mode=end_to_end", "training.swap=never")
    swapped = ["training.mode=end_to_end", "training.swap=always", "training.checkpoint_steps=1"]
    runs.kill_in_training("swapped", *swapped)
    assert weights(runs.run("swapped", *swapped)) == weights(whole) != weights(staged)
    # What its file says is a part of what was trained: another file, and what it shapes trains anew.
    for kind, first in (("int16", "reuse"), ("smooth", "train")):  # what reads no boundary has nothing of a codec
        runs.files[kind].write_text(KINDS[kind][0] + "\n# another\n")
        assert runs.actions("staged") == [first, *["train"] * (len(staged) - 1)], kind
        runs.files[kind].write_text(KINDS[kind][0])
