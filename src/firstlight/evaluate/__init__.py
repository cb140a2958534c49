"""What a setting costs and what it gives: speed now, on this machine; later, beside it, quality."""
