"""Which cells of the grid are computed at all: row policies, one file a method."""
