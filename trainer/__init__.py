"""Training: configuration, data, engine, loop, checkpoints, metrics. Knows ranks, disk and
clock."""
