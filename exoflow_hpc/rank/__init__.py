"""What runs in a rank: the agent that executes tasks, and on the head rank the controller that says which."""

from __future__ import annotations
