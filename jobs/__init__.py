"""The command line: one module a command group, `python -m jobs GROUP ...`."""
