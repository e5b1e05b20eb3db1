"""Finds a step benchmark, in a folder or on the Hugging Face hub, and loads it by its layout."""

import re

from etils import epath

from bis_jax import files
from bis_jax.evaluation import process_bench, visual_process_bench
from bis_jax.evaluation.visual_process_bench import BenchmarkItem

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = [visual_process_bench.ANNOTATIONS, "images.zip", "*.json"]


def load(name: str) -> list[BenchmarkItem]:
  """Returns the checked items of a benchmark, given as a folder or a dataset id of the hub."""
  # `OpenGVLab/VisualProcessBench` and `Qwen/ProcessBench` are downloaded if no folder has that
  # name.
  folder = files.absolute(name)
  if not folder.is_dir():
    folder = _download(name)
  if (folder / visual_process_bench.ANNOTATIONS).is_file():
    return visual_process_bench.load(folder)
  return process_bench.load(folder)


def _download(hub_id: str) -> epath.Path:
  missing = f"no benchmark folder at {files.absolute(hub_id)}"
  if not _HUB_ID.fullmatch(hub_id):
    raise FileNotFoundError(missing)
  import huggingface_hub  # here, because a local folder needs nothing of the hub

  try:
    return epath.Path(
      huggingface_hub.snapshot_download(hub_id, repo_type="dataset", allow_patterns=_FILES)
    )
  except Exception as error:  # the hub, its HTTP client and the network each raise their own
    raise FileNotFoundError(
      f"{missing}, and the hub did not give the dataset {hub_id} ({type(error).__name__}: "
      f"{error}): name a folder, or get it with\n"
      f"  hf download {hub_id} --repo-type dataset --local-dir FOLDER"
    ) from error
