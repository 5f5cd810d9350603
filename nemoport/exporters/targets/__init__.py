"""One module for each thing that `convert --to` writes."""
