"""A worker's side: one stage trained, committed, its boundary written, in a process that may open nothing else."""
