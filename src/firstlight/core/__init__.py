"""The nouns of the engine. Everything else imports them; they import nothing of ours."""
