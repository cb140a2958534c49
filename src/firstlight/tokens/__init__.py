"""Which cells of the grid are computed at all? Row policies, one file a method."""
