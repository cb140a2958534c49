"""Layer math, one file per architecture family, and the weights that feed it (`weights/`)."""
