"""The online runtime: a plan on Ray Serve."""
