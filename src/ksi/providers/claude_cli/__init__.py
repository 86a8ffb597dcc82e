"""Kind `claude-cli`: Claude Code, headless, as a full model."""

from ksi.providers.claude_cli.provider import ClaudeProvider, Options, build

__all__ = ["ClaudeProvider", "Options", "build"]
