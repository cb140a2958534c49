"""What runs inside a peer's environment: the standard library and the peer (and our engine, in `run_firstlight`)."""
