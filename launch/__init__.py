"""The `qsparse` command: starts runs, checks configurations.  Imports no torch, so that it runs on a login node."""
