"""How events come in and replies go out."""
