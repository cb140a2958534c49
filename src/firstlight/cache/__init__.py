"""Which K/V are there, and which stay? The block pool, and each request's block table over it."""
