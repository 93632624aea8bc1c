"""Distillers: from a user's train interactions to a profile and one memory per interaction."""
