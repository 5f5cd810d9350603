"""One module for each thing that `compile --to` builds."""
