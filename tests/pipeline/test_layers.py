"""What identifies layers of one's own: their code and all it reaches, or nothing is reused."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stackwise import UnifiedTrainer
from stackwise.errors import UsageError
from stackwise.pipeline.library.layers import Undescribed, identity
from tests.pipeline.test_library import config, data

__all__ = ["data"]

PLAIN = """
import math, functools, enum
import torch
from torch import nn
from torch.nn import functional as F
import helpers

SCALE = 2.0
TABLE = {"a": [1, 2]}
class Kind(enum.Enum):
    ONE = 1
def activation(x, power=1):
    return torch.relu(x) ** power
def made(slope):
    def inside(x):
        return F.leaky_relu(x, slope) * SCALE
    return inside
class Base(nn.Module):
    gain = 0.5
    def outer(self, x):
        return self.gain * x
class Layer(Base):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("kept", torch.ones(4))
        self.register_buffer("passing", torch.ones(4), persistent=False)
        self.factor = 1.5
        self.function = made(0.1)
        self.bound = functools.partial(activation, power=2)
        self.kind = Kind.ONE
    @property
    def half(self):
        return self.factor / 2
    def forward(self, x):
        y = [self.function(z) for z in x.split(1)]
        return self.outer(activation(self.linear(torch.cat(y)))) + TABLE["a"][0] + self.half + helpers.shift(x)
layer = Layer()
"""
HELPERS = "OFFSET = 1\ndef shift(x):\n    return x.mean() + OFFSET\ndef unused(x):\n    return x\n"
EDITS = [
    ("self.outer(activation", "self.outer(activation(activation"[:-11] + "torch.tanh"),
    ("SCALE = 2.0", "SCALE = 2"),
    ('"a": [1, 2]', '"a": [1, 3]'),
    ("torch.relu(x)", "torch.tanh(x)"),
    ("power=1", "power=3"),
    ("power=2", "power=3"),
    ("made(0.1)", "made(0.2)"),
    ("F.leaky_relu(x, slope)", "F.elu(x, slope)"),
    ("gain = 0.5", "gain = 0.25"),
    ("return self.gain * x", "return self.gain + x"),
    ('"kept", torch.ones(4)', '"kept", torch.zeros(4)'),
    ('"passing", torch.ones(4)', '"passing", torch.zeros(4)'),
    ("self.factor = 1.5", "self.factor = 1.25"),
    ("self.factor / 2", "self.factor / 3"),
    ("Kind.ONE", "Kind(1), 0"),
    ("nn.Linear(4, 4)", "nn.Linear(4, 4, bias=False)"),
    ("layer = Layer()", "layer = Layer(); layer.register_forward_hook(lambda m, i, o: 2 * o)"),
    ("layer = Layer()", "layer = Layer(); layer.linear.register_forward_pre_hook(lambda m, i: (i[0] + 1,))"),
    ("layer = Layer()", "layer = Layer(); layer.forward = lambda x: x"),
    ("layer = Layer()", "layer = Layer(); layer.eval()"),
]


def made(text: str, helpers: str = HELPERS) -> nn.Module:
    """The layer that a program ends with."""
    module = types.ModuleType("helpers")
    exec(compile(helpers, "helpers.py", "exec"), module.__dict__)
    sys.modules["helpers"] = module
    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(text, "program.py", "exec"), names)
    layer = names["layer"]
    assert isinstance(layer, nn.Module)
    return layer


def test_the_same_program_has_the_same_identity_here_and_in_another_process() -> None:
    first = identity(made(PLAIN))
    assert identity(made(f"# a comment\n\n{PLAIN}")) == first
    assert identity(made(PLAIN, HELPERS.replace("return x\n", "return 2 * x\n"))) == first, "nobody reaches it"
    names = "PLAIN, identity, made, nn"
    program = f"from tests.pipeline.test_layers import {names}\nprint(identity(made(PLAIN)), identity(nn.GRU(2, 2)))"
    there = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.split() == [first, identity(nn.GRU(2, 2))]


def test_every_edit_of_what_a_layer_reaches_is_another_identity() -> None:
    seen = {identity(made(PLAIN))}
    for before, after in EDITS:
        assert before in PLAIN
        seen.add(identity(made(PLAIN.replace(before, after))))
    seen.add(identity(made(PLAIN, HELPERS.replace("OFFSET = 1", "OFFSET = 2"))))
    seen.add(identity(made(PLAIN, HELPERS.replace("x.mean()", "x.amax()"))))
    assert len(seen) == len(EDITS) + 3


def test_what_was_put_in_place_of_torchs_own_functions_is_another_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {identity(made(PLAIN))}
    for owner, name, other in (
        (nn.functional, "leaky_relu", torch.tanh),
        (nn.functional, "leaky_relu", lambda x, slope: x),
        (nn.functional, "linear", lambda x, weight, bias: x),  # which the layer reaches through torch alone
        (nn.Linear, "forward", lambda self, x: x),
        (nn.Module, "__call__", lambda self, x: self.forward(x)),
        (torch.Tensor, "split", lambda self, size: [self]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, other)
            seen.add(identity(made(PLAIN)))
    assert len(seen) == 7
    assert identity(made(PLAIN)) in seen


def test_which_names_are_one_parameter_is_in_the_identity() -> None:
    apart, tied = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
    tied[1].weight = tied[0].weight
    assert identity(apart) != identity(tied)


@pytest.mark.parametrize(
    "line",
    [
        "import os\ndef act(x): return x * float(os.environ.get('FACTOR', 1))",
        "import random\ndef act(x): return x * random.random()",
        "import numpy as np\ndef act(x): return x * np.random.rand()",
        "def act(x): return x * len(open('weights').read())",
        "def act(x): return eval('x')",
        "import threading\nlock = threading.Lock()\ndef act(x):\n    with lock: return x",
        "def act(x): return torch.ops.mine.op(x)",
    ],
)
def test_what_does_not_follow_from_the_code_has_no_identity(line: str) -> None:
    text = f"import torch\n{line}\nclass L(torch.nn.Module):\n    def forward(self, x): return act(x)\nlayer = L()"
    with pytest.raises(Undescribed):
        identity(made(text))


class Plus(nn.Module):
    """A layer that does what it is told."""

    def __init__(self, do: Any) -> None:
        super().__init__()
        self.linear, self.do, self.calls = nn.Linear(32, 32), do, 0

    def forward(self, x: torch.Tensor) -> Any:
        return self.do(self, x + self.linear(x))


def counted(layer: Plus, x: torch.Tensor) -> torch.Tensor:
    layer.calls += 1
    return x / layer.calls


def test_a_layer_that_changes_itself_is_never_reused_and_it_is_said_once(data: torch.Tensor, tmp_path: Path) -> None:
    for _ in range(2):
        layers = [Plus(counted), Plus(counted)]
        with pytest.warns(UserWarning, match="nothing is reused later: layer 0") as warned:
            results = UnifiedTrainer(config(steps=2), store=tmp_path).train_all_layers([data[:64]], layers)
        assert not any(result.reused for result in results)
        assert len(warned) == 1
        assert layers[0].calls > 0


def fail(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such thing\nand more")


@pytest.mark.parametrize(
    ("do", "line"),
    [
        (lambda layer, x: (x,), r"layer 1 \(Plus\) returns tuple, not a tensor"),
        (lambda layer, x: None, r"layer 1 \(Plus\) returns NoneType"),
        (lambda layer, x: x[:, :-1], r"layer 1 \(Plus\) returns the shape"),
        (lambda layer, x: x.mean(-1), r"layer 1 \(Plus\) returns the shape"),
        (lambda layer, x: x.double(), r"layer 1 \(Plus\) returns torch.float64"),
        (lambda layer, x: x * float("nan"), r"layer 1 \(Plus\) returns values that are not finite"),
        (fail, r"layer 1 \(Plus\) raises RuntimeError .*: no such thing"),
    ],
)
def test_what_a_layer_may_not_do_is_a_line_that_names_it(
    do: Any, line: str, data: torch.Tensor, tmp_path: Path
) -> None:
    layers = [Plus(lambda layer, x: x), Plus(do)]
    with pytest.raises(UsageError, match=line):
        UnifiedTrainer(config(steps=2), store=tmp_path).train_all_layers([data[:64]], layers)
    assert not list(tmp_path.iterdir())


def test_shared_and_absent_weights_are_refused(data: torch.Tensor, tmp_path: Path) -> None:
    one = Plus(lambda layer, x: x)
    for layers, line in (
        ([one, one], r"layer 1 \(Plus\) shares its parameter linear.weight with layer 0"),
        ([one, Plus(lambda layer, x: x).to("meta")], r"layer 1 \(Plus\): linear.weight is on the meta device"),
        ([one, "layer"], "layer 1 is no torch.nn.Module but of str"),
        ([one, Plus(lambda layer, x: x).bfloat16()], r"layer 1 \(Plus\) raises RuntimeError where it is given float32"),
    ):
        with pytest.raises(UsageError, match=line):
            UnifiedTrainer(config(steps=2), store=tmp_path).train_all_layers([data[:64]], layers)  # type: ignore[arg-type]


def test_probing_leaves_everything_as_it_was(data: torch.Tensor, tmp_path: Path) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x)

    results = [
        UnifiedTrainer(config(steps=2), store=tmp_path).train_all_layers([data[:64]], [layer, layer2])
        for layer, layer2 in itertools.repeat((Normed(), Normed()), 1)
    ]
    again = UnifiedTrainer(config(steps=2), store=tmp_path).train_all_layers([data[:64]], [Normed(), Normed()])
    assert all(result.reused for result in again)
    assert [r.loss for r in again] == [r.loss for r in results[0]]
