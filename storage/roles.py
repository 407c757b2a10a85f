"""Roles: what a text is for its teacher, which decides the prompt that the teacher reads before it."""

from __future__ import annotations

from typing import Literal, get_args

Role = Literal["text", "query", "document"]
"""`text` is the role of all texts of a corpus that names no others."""

ROLES: tuple[Role, ...] = get_args(Role)
"""All roles, in the order in which a corpus has their shards."""
