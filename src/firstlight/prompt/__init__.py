"""What are the tokens? Text and chats to token ids, and ids back to text."""
