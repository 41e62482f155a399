"""The flight-delay example: data, point-in-time features, nodes and training."""
