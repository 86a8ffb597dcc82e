"""Chains: where results go, what stops a chain, and how an injected text is wrapped; decisions without I/O."""
