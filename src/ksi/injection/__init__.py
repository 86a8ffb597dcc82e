"""Chains: the targets of results, the limits of a chain, and the wrapping of injected text; decisions without I/O."""
