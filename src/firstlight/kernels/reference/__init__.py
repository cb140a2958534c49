"""The judge: every operator in its plainest form. Tests compare the other backends with it; it is never in a run."""
