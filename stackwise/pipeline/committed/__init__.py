"""What is done with a run's committed weights: loaded, evaluated, sampled from, exported, its boundaries healed."""
