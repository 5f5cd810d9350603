"""From an artifact to engines that are of one kind of machine: built here, or by a job for the machine that can."""
