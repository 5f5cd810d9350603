"""One module for each layout of a checkpoint on disk: `recognises(path)` and `read(path)`."""
