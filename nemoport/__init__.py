"""nemoport: from a NeMo or Megatron checkpoint to a Triton model repository that is known to work."""

__version__ = "0.1.0"
