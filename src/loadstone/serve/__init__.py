"""Models behind an API that OpenAI's clients speak, and a page to look inside."""
