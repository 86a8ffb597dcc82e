"""The transport that providers over HTTP share. Each dialect is a kind, and so a module next to this package."""
