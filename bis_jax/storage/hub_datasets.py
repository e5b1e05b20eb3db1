"""Datasets of the Hugging Face hub as local folders."""

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

  Raises FileNotFoundError that begins with `missing` if the name is no hub id, or the hub gives
  nothing.
  """
  if not is_hub_id(hub_id):
    raise FileNotFoundError(missing)
  import huggingface_hub  # here, because a local folder needs nothing of the hub

  try:
    return epath.Path(
      huggingface_hub.snapshot_download(hub_id, repo_type="dataset", allow_patterns=[*patterns])
    )
  except Exception as error:  # the hub, its HTTP client and the network each raise their own
    raise FileNotFoundError(
      f"{missing}, and the hub did not give the dataset {hub_id} ({type(error).__name__}: "
      f"{error}): name a folder, or get it with\n"
      f"  hf download {hub_id} --repo-type dataset --local-dir FOLDER"
    ) from error
