"""A loop over batches: how a stage learns. Knows no run, no schedule and no process."""
