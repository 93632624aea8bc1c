"""Trained adapters as others load them: PEFT folders, merged checkpoints, model cards, serving commands."""
