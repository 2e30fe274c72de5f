"""Measurements of StackWise's main job, each a command: `python -m benchmarks.stage`, `feed`, `depth`, `demo`.

Speeds are given as ratios within one run, from interleaved rounds, with their spread: absolute times do not repeat
on shared machines. `python -m benchmarks` runs all of them and writes their tables into docs/benchmarks.md.
"""

import os

from stackwise.pipeline.runner.workers import ENVIRONMENT

# What is measured in this process waits as a worker does; it must be said before torch is imported.
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
