"""From service version 1 to version 2 and back: checks, backup, V1's data, and the way home."""
