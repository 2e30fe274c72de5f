"""The pipeline: a schedule of stages, a recipe for each, workers that train them, a runner that drives them."""
