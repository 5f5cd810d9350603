"""Checkpoints in, artifacts out: readers, families, targets and the engine that streams between them."""
