"""How the code inside an instance is spoken to: one contract per file, one protocol (base.py)."""
