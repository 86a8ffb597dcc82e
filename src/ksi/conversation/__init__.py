"""Conversations: their locks, lives and forks."""
