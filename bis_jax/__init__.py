"""Multimodal process reward models from a tenth of the data; see README.md."""

__version__ = "0.1.0"  # read by pyproject.toml without importing anything
