"""All that a store holds, in memory: between its own form and the records of a snapshot."""
