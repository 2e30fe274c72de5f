"""The pipeline: a schedule of stages, a recipe for each, workers that train them, a runner that drives them.

Here lies what both sides share; a room each for the worker's side, the runner's, the plan of a run, what is done with
committed weights, trackers and batches of runs.
"""
