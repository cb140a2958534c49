"""Which K/V there are: the block pool, and each request's block table over it."""
