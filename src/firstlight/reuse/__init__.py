"""Which cells of the grid are already known? The prefix cache, and documents on disk."""
