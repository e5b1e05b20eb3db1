"""Python imports this when it starts: torch then counts as not installed."""

import sys

sys.modules["torch"] = None
