"""Backends: each has a file per operation. `select` picks one; they never import each other."""
