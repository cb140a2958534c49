"""What some methods need before use; nothing on the path of a prompt imports it."""
