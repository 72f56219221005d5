"""Short trainings that criteria of the whole model run, and that leave it as it was."""
