"""Sentence vectors, made by a small model in a process of its own; an extra (`pip install ksi[meaning]`)."""
