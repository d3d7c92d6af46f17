"""Data sets: their files, shards of examples, batches for training."""
