"""Parts of Firstlight inside other engines."""
