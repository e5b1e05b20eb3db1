"""Datasets of the Hugging Face hub as local folders."""

import os
import re
from collections.abc import Sequence

from etils import epath

from bis_jax.storage import is_url

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(name: str) -> bool:
  """Returns whether a name that is no file or folder here may be one of the hub."""
  return not is_url(name) and bool(_HUB_ID.fullmatch(name)) and not epath.Path(name).exists()


def download(hub_id: str, missing: str, patterns: Sequence[str]) -> epath.Path:
  """Returns a folder with the files of a dataset whose names match a pattern.

  A name in a folder that exists here is probably a mistyped path: the hub is not asked for it. Raises
  FileNotFoundError that begins with `missing` if the name is not a hub id, or nothing is found.
  """
  if not is_hub_id(hub_id):
    raise FileNotFoundError(missing)
  import huggingface_hub  # here, because a local folder needs nothing of the hub

  here = os.path.isdir(os.path.dirname(os.path.abspath(hub_id)))
  try:
    return epath.Path(
      huggingface_hub.snapshot_download(
        hub_id, repo_type="dataset", allow_patterns=[*patterns], local_files_only=here
      )
    )
  except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
    why = (
      f"its folder exists, so the hub was not asked for it: correct the name of {hub_id}"
      if here
      else f"the hub did not give the dataset {hub_id} ({type(error).__name__}: {error}): name a folder"
    )
    raise FileNotFoundError(
      f"{missing}, and {why}, or get it with\n"
      f"  hf download {hub_id} --repo-type dataset --local-dir FOLDER"
    ) from error
