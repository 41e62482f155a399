"""What can be seen of a graph at work."""
