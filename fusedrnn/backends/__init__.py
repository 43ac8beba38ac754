"""Backends that can run a layer. `select` picks one; they never import each other."""
