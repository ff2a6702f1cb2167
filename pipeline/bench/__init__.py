"""Measurements that a user can repeat: `qsparse bench`."""
