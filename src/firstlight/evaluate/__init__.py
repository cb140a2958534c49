"""What a setting gives and what it costs: speed on this machine, beside other engines and the limit, and quality."""
