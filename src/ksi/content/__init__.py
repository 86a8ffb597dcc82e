"""The content of messages and answers: one normal form of blocks, and its translation to and from the vendors'
dialects."""
