"""Models made of models: their wiring, and the way of a request through it."""
