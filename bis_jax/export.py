"""Exports a run's latest checkpoint as a Hugging Face folder.

    python -m bis_jax.export --workdir=runs/qwen_bis10 --out=exported
    python -m bis_jax.export --workdir=runs/qwen_bis10 --out=exported --dtype=float32 --base=

Transformers loads the folder: safetensors, config, tokenizer with the step marker, image processor
and a model card. The columns of the reward head are the rows of `Yes` and `No` of its LM head; the
other rows are those of the initial checkpoint. A model from a checkpoint in InternVL's released
layout is exported in that layout, which the release's own code loads.

A run with adapters is merged, or with --adapter exported as a folder of PEFT, beside its base.
--workdir may also be such a folder, which is then merged with its base (--base, if it moved).

The folder is also what `--checkpoint` of the other commands takes, and what vLLM serves (`vllm serve
exported --config exported/vllm.yaml`). `--push=OWNER/NAME` uploads it to a private repository of the
hub with the token of `hf auth login` or HF_TOKEN.
"""

from typing import Any

import huggingface_hub
from absl import app, flags
from etils import epath

from bis_jax import files
from bis_jax.console import command
from bis_jax.errors import UserError
from bis_jax.hub import hf_folder, peft_folder, weights
from bis_jax.hub.card import model_card
from bis_jax.models import learning_rates
from bis_jax.models.adaptation import is_adapter, merged
from bis_jax.scoring.restore import load_run
from bis_jax.settings import exported, locations
from bis_jax.training import checkpoint, pretrain

_WORKDIR = flags.DEFINE_string(
  "workdir", "", "workdir of a run of bis_jax.main, or folder of adapters to merge"
)
_OUT = flags.DEFINE_string("out", "", "folder to write, new or empty")
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["float32", "bfloat16", "float16"], "dtype of the tensors"
)
_BASE = flags.DEFINE_string(
  "base",
  None,
  "checkpoint with the other rows of the LM head; default: the run's; empty: rows of zeros",
)
_ADAPTER = flags.DEFINE_bool("adapter", False, "of a run with LoRA, adapters alone, for PEFT")
_LICENSE = flags.DEFINE_string(
  "license", None, "identifier on the card; default: that of the initial checkpoint"
)
_PUSH = flags.DEFINE_string("push", "", "hub id OWNER/NAME to upload the folder to; default: none")


_MESH = {"data": 1, "fsdp": -1, "tensor": 1}  # not the run's own


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
    if _ADAPTER.value:
      if _BASE.value or flags.FLAGS["dtype"].present:
        raise UserError(
          "--adapter writes float32 beside the run's own base: leave out --dtype, --base"
        )
      export_adapter(_WORKDIR.value, out, _LICENSE.value)
    else:
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
  adapters = (files.absolute(workdir) / weights.ADAPTER_CONFIG).exists()
  run = load_run(workdir, _MESH, base if adapters else None)
  base = run.config.model.checkpoint if base is None else base
  folder = weights.find_checkpoint(base) if base else None
  manifest, evaluation = _results(workdir)
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
    merged(run.params, run.model.adaptation),
    run.model,
    run.processor,
    base=folder,
    dtype=dtype,
    card=card,
    run={exported.FILE: exported.content(run.config, run.step, manifest, evaluation)},
  )
  print(f"wrote step {run.step} of {workdir} to {out} in {dtype}")


def export_adapter(workdir: str, out: epath.Path, license: str | None = None) -> None:
  """Writes the adapters of a run, and what else it trained, as a folder of PEFT."""
  hf_folder.require_empty(out)
  if (files.absolute(workdir) / weights.ADAPTER_CONFIG).exists():
    raise UserError(f"{workdir} is a folder of adapters already: without --adapter it is merged")
  run = load_run(workdir, _MESH)
  base = pretrain.base_folder(run.config, locations.locate(run.config))
  if run.model.adaptation is None or not any(map(is_adapter, run.params)) or base is None:
    raise UserError(
      f"{workdir} is not a LoRA run that started from a checkpoint: export it without --adapter"
    )
  manifest, evaluation = _results(workdir)
  name = run.config.model.checkpoint or str(base)
  card = model_card(
    run=run.config.to_dict(),
    processor=run.processor,
    manifest=manifest,
    evaluation=evaluation,
    step=run.step,
    other_rows="those of the base",
    plain=hf_folder.is_plain(run.model, base),
    name=out.name,
    license=license,
    adapter_of=name,
  )
  factor = learning_rates.factors(run.config, run.params)
  trained = {path for path, value in factor.items() if value}
  frozen = {path: value for path, value in run.params.items() if path not in trained}
  sums = checkpoint.checksums({"frozen": frozen})
  peft_folder.write(
    out,
    run.params,
    trained,
    run.model,
    run.processor,
    base=base,
    base_name=name,
    card=card,
    run={
      exported.FILE: exported.content(run.config, run.step, manifest, evaluation, sums),
      "manifest.json": {key: value for key, value in manifest.items() if key != "lines"},
    }
    | ({"evaluation.json": evaluation} if evaluation else {}),
  )
  print(f"wrote the adapters of step {run.step} of {workdir} to {out}, beside {name}")


def _results(workdir: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """Returns the content of a run's manifest.json and evaluation.json, if it has one."""
  place, remedy = files.absolute(workdir), "resume the run, which writes it again"
  files.changed_files(place, "manifest.json", "evaluation.json")
  report = place / "evaluation.json"
  evaluation = files.read_json(report, remedy) if report.exists() else None
  return files.read_json(place / "manifest.json", remedy), evaluation


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
