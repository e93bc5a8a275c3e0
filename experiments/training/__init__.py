"""Training: what arms there are, a step, the loop around it, and scores."""
