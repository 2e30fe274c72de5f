"""The pipeline: handing off, starting again, a slow disk, many stages, passes fused and separate."""
