"""Operators on rows and blocks: the reference that judges, and the backends that run."""
