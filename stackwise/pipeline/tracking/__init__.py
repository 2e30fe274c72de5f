"""Trackers of a run: TensorBoard, Weights & Biases, MLflow, each following the run's log of events."""
