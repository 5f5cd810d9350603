"""A small Triton-compatible server: the same requests get the same answers, errors included."""
