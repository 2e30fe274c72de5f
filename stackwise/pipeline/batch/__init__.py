"""Many at once: a run as jobs of a batch system, a sweep of runs."""
