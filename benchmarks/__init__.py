"""Ours against peers, on this machine and in one run."""
