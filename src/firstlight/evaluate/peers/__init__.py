"""Other engines beside ours on the same prompts: their environments, their files, their best settings, their rows."""
