"""Runs a command of bis_jax in this process."""

import importlib
import sys

from absl import flags


def run_command(name: str, *arguments: str) -> str | None:
  """Returns the message that `python -m bis_jax.NAME` exits with; None if it succeeds."""
  for module in [m for m in flags.FLAGS.flags_by_module_dict() if m.startswith("bis_jax.")]:
    for flag in flags.FLAGS.get_flags_for_module(module):  # commands share names of flags
      delattr(flags.FLAGS, flag.name)
    sys.modules.pop(module, None)
  command = importlib.import_module(f"bis_jax.{name}")
  flags.FLAGS.unparse_flags()
  try:
    command.main(flags.FLAGS([name, *arguments]))
  except SystemExit as exit:
    return exit.code
  finally:
    flags.FLAGS.mark_as_parsed()
  return None
