"""Which cells are already known."""
