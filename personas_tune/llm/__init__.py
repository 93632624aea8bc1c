"""A journalled, rate-limited client of OpenAI-compatible servers."""
