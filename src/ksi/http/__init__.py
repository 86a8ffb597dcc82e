"""The HTTP door: Anthropic's and OpenAI's shapes, and KSI's own events, on one port."""
