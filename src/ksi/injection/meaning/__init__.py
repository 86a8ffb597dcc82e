"""Recognises chains that go on without getting on: by what their sentences say, not by how they look."""
