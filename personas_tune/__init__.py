"""Persona-sharded fine-tuning of small language models into recommender-user agents."""

__version__ = "0.1.0"
