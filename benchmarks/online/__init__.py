"""One model behind several servers; imported by every server's own environment, so kept empty."""
