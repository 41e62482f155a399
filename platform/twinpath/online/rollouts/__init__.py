"""Rollouts on Serve: replicas report, a controller decides, operators command."""
