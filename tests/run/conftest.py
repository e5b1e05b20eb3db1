"""Runs here share programs and draw no plots."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _fast(programs_once, no_plots):
  """Whole runs in processes of their own, as in launch_test, trace anew and draw."""
