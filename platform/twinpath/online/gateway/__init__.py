"""The gateway: rules that every request passes before its rows are read."""
