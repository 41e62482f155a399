"""Rollouts: which rows go to which version, what is counted, and what follows from it. Pure."""
