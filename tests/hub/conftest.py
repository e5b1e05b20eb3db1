"""Fixtures that compare with Transformers' own models; see `tests/torch_reference.py`."""

from tests.torch_reference import config, folder, lab, model, params, torch_model

__all__ = ["config", "folder", "lab", "model", "params", "torch_model"]
