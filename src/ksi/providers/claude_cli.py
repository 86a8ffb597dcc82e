"""Claude Code, headless, as a full model: conversations resume, turns stream, and nothing forks or stays behind unseen.

A conversation is a session of Claude Code. Its process is kept warm for the next turn; a turn that was not good ends
it, and the next one begins in a new process at the last good message (F9). Before a turn and after it the session's
transcript is looked at: what others wrote there is told, and left aside (L7).
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec
import structlog

from ksi.errors import FailureClass, ProviderError
from ksi.providers.base import Call, Capabilities, Chunk, Completion, Setting
from ksi.providers.claude_faults import is_lost, says_lost
from ksi.providers.claude_launch import (
    OWN_SYSTEM,
    PLAIN_SYSTEM,
    Launch,
    Place,
    environment,
    inert,
    mcp_text,
    quoted,
)
from ksi.providers.claude_pool import ClaudePool
from ksi.providers.claude_process import ClaudeProcess, EndedError, ProcessFault, SilentError, Spot
from ksi.providers.claude_setup import Installation
from ksi.providers.claude_stream import Event, Finished
from ksi.providers.claude_transcript import Seal, Tail, find, look_back, look_on, projects_folder
from ksi.providers.claude_turn import Turn
from ksi.providers.process import ProcessRegistry, ProcessStartError
