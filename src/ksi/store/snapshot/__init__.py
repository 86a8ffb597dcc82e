"""All that a store holds: its records, the file of a checkpoint, and the move to another store."""
