"""What an experiment is made of, and the experiments that have a name."""
