"""Nodes in the box. Each is imported from its module, as each needs other packages."""
