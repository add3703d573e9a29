"""An answer of poold, as the end-to-end tests look at it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer read to its end. Header names are lower-case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def start_kind(self) -> str:
        """X-Poold-Start, "" when no instance was involved."""
        return self.headers.get("x-poold-start", "")

    @property
    def error(self) -> dict[str, Any]:
        """poold's own error: code, message, hint ..."""
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found
