"""Benchmarks of the store beside its peers: same bytes, same order, one process, ratios of interleaved pairs."""
