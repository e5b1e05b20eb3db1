"""Exports a run's latest checkpoint as a Hugging Face folder.

    python -m bis_jax.export --workdir=runs/qwen_bis10 --out=exported
    python -m bis_jax.export --workdir=runs/qwen_bis10 --out=exported --dtype=float32 --base=

Transformers loads the folder: safetensors, config, tokenizer with the step marker, image processor
and a model card. The columns of the reward head are the rows of `Yes` and `No` of its LM head; the
other rows are those of the initial checkpoint. A model from a checkpoint in InternVL's released
layout is exported in that layout, which the release's own code loads.

The folder is also what `--checkpoint` of the other commands takes, and what vLLM serves (`vllm serve
exported --config exported/vllm.yaml`). `--push=OWNER/NAME` uploads it to a private repository of the
hub with the token of `hf auth login` or HF_TOKEN.
"""

import huggingface_hub
from absl import app, flags
from etils import epath

from bis_jax import files
from bis_jax.console import command
from bis_jax.errors import UserError
from bis_jax.hub import hf_folder, weights
from bis_jax.hub.card import model_card
from bis_jax.scoring.restore import load_run
from bis_jax.settings import exported

_WORKDIR = flags.DEFINE_string("workdir", "", "workdir of a run of bis_jax.main")
_OUT = flags.DEFINE_string("out", "", "folder to write, new or empty")
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["float32", "bfloat16", "float16"], "dtype of the tensors"
)
_BASE = flags.DEFINE_string(
  "base",
  None,
  "checkpoint with the other rows of the LM head; default: the run's; empty: rows of zeros",
)
_LICENSE = flags.DEFINE_string(
  "license", None, "identifier on the card; default: that of the initial checkpoint"
)
_PUSH = flags.DEFINE_string("push", "", "hub id OWNER/NAME to upload the folder to; default: none")


def main(argv: list[str]) -> None:
  with command("export", argv, "--out=FOLDER"):
    if not _WORKDIR.value or not _OUT.value:
      raise UserError("set --workdir (of a run) and --out (folder to write)")
    files.refuse_overwriting(
      {"--out": _OUT.value}, {"--workdir": _WORKDIR.value, "--base": _BASE.value}
    )
    if _PUSH.value:
      _check_token(_PUSH.value)
    out = files.absolute(_OUT.value)
    export_run(_WORKDIR.value, out, _DTYPE.value, _BASE.value, _LICENSE.value)
    if _PUSH.value:
      push(out, _PUSH.value)


def export_run(
  workdir: str, out: epath.Path, dtype: str, base: str | None, license: str | None = None
) -> None:
  """Writes the latest checkpoint of a run into a new or empty folder; see `hf_folder.write`.

  `license` as in `model_card`. `base` is a folder or hub id of the checkpoint with the LM head's
  other rows; "": they are zero; None: the initial checkpoint of the run.
  """
  run = load_run(workdir, {"data": 1, "fsdp": -1, "tensor": 1})  # not the run's own mesh
  place = files.absolute(workdir)
  base = run.config.model.checkpoint if base is None else base
  folder = weights.find_checkpoint(base) if base else None
  remedy, report = "resume the run, which writes it again", place / "evaluation.json"
  files.changed_files(place, "manifest.json", "evaluation.json")
  manifest = files.read_json(place / "manifest.json", remedy)
  evaluation = files.read_json(report, remedy) if report.exists() else None
  card = model_card(
    run=run.config.to_dict(),
    processor=run.processor,
    manifest=manifest,
    evaluation=evaluation,
    step=run.step,
    other_rows="those of the initial checkpoint" if base else "zero",
    plain=hf_folder.is_plain(run.model, folder),
    name=out.name,
    license=license,
  )
  hf_folder.write(
    out,
    run.params,
    run.model,
    run.processor,
    base=folder,
    dtype=dtype,
    card=card,
    run={exported.FILE: exported.content(run.config, run.step, manifest, evaluation)},
  )
  print(f"wrote step {run.step} of {workdir} to {out} in {dtype}")


def _check_token(name: str) -> None:
  if not weights.is_hub_id(name):
    raise UserError(f"--push={name} is not a hub id such as OWNER/NAME")
  if not huggingface_hub.get_token():
    raise UserError("--push needs a token of the hub: run `hf auth login`, or set HF_TOKEN")


def push(folder: epath.Path, name: str) -> None:
  """Uploads an exported folder to the hub; raises UserError if the hub refuses it."""
  api = huggingface_hub.HfApi()
  try:
    api.create_repo(name, private=True, exist_ok=True)
    with files.read_locally(folder, "*") as local:
      info = api.upload_folder(
        repo_id=name, folder_path=str(local), commit_message="Export of bis_jax"
      )
  except (huggingface_hub.errors.HfHubHTTPError, ValueError) as error:
    raise UserError(
      f"{folder} is written, but the hub did not take it as {name} ({error}): upload it with "
      f"`hf upload {name} {folder}`"
    ) from error
  print(f"uploaded to {getattr(info, 'commit_url', name)}")


if __name__ == "__main__":
  app.run(main)
