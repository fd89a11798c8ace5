"""`unbackdoor serve`: an OpenAI-compatible endpoint with guards in front, for a model here or before an upstream."""
