"""One module for each family of models: tables of names and config keys."""
