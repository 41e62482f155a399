"""Features from Feast: read online, joined at a moment offline. The only package that imports it.

``repo`` opens a feature repository and says what a feature service has; ``online`` reads its
newest values for a batch of keys; ``history`` joins the values that held at given moments;
``rows`` turns either into the columns of a node. Nothing is imported here: each module needs
other packages.
"""
