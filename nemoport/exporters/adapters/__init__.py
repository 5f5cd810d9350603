"""One module for each way that an adapter is stored: `recognises(path)` and `read(path)`."""
