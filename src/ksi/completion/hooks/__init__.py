"""Hooks: what happened is told to commands and webhooks."""
