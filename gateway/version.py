"""The version, as a constant: reading the installed package's metadata takes longer than poolctl --help may."""

from __future__ import annotations

VERSION = "0.1.0"
