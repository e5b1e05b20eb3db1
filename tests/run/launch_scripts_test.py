"""The scripts in launch/, without the run that they start: arguments, sweeps and cloud commands."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

import pytest

from tests.commands import run_command

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _script(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [f"launch/{name}", *arguments],
    cwd=ROOT,
    env=os.environ | variables,
    capture_output=True,
    text=True,
    timeout=60,
  )


def _executable(path: pathlib.Path, text: str) -> str:
  path.write_text("#!/usr/bin/env bash\n" + text)
  path.chmod(0o755)
  return str(path)


@pytest.mark.parametrize(
  "name, arguments",
  [
    ("local_pod.sh", ["2", "--workdir=x"]),
    ("local_pod.sh", ["two", "4", "--workdir=x"]),
    ("sweep.sh", ["runs", "--fractions=0.1", "--", "--config=x"]),
    (
      "sweep.sh",
      ["runs", "--fractions=1", "--strategies=bis", "--seeds=0", "--speed=9", "--", "-x"],
    ),
    ("tpu_pod.sh", ["name", "zone", "--", "--config=x"]),
    ("tpu_pod.sh", ["name", "zone", "v5p-32", "--dry-run"]),
    ("gke_xpk.sh", ["name", "cluster", "v5p-32", "--zones=a", "--", "--config=x"]),
    ("slurm.sbatch", []),
  ],
)
def test_bad_arguments_show_how_it_is_used(name, arguments):
  done = _script(name, *arguments)
  assert done.returncode == 2 and f"launch/{name}" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.s*")), ids=lambda path: path.name)
def test_scripts_parse_are_strict_and_may_be_run(path):
  assert subprocess.run(["bash", "-n", path]).returncode == 0
  assert "set -euo pipefail" in path.read_text() and os.access(path, os.X_OK)


def test_a_pod_whose_process_fails_ends_the_others(tmp_path):
  python = _executable(
    tmp_path / "python",
    "if [[ $1 == -c ]]; then echo 1234; exit; fi\n"
    'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS: $*"\n'
    "if [[ $JAX_PROCESS_ID == 1 ]]; then exit 7; fi\nexec sleep 60\n",
  )
  done = _script("local_pod.sh", "3", "4", "--workdir=a b", PYTHON=python, GRACE="1")
  assert done.returncode == 7
  assert "[0] 0 of 3 at localhost:1234: -m bis_jax.main --workdir=a b" in done.stdout
  ended = dict(re.findall(r"process (\d) ended with (\d+)", done.stderr))
  assert ended == {"1": "7", "0": "137", "2": "137"}


def test_a_sweep_runs_all_skips_the_finished_and_lists_the_failed(tmp_path):
  run = _executable(
    tmp_path / "run",
    "for flag; do if [[ $flag == --workdir=* ]]; then out=${flag#*=}; fi; done\n"
    f'echo "$@" >> {tmp_path}/calls\n'
    "if [[ $out == *random* && ! -e $out.fixed ]]; then echo broken; exit 3; fi\n"
    "mkdir -p $out; touch $out/evaluation.json\n",
  )
  runs = tmp_path / "runs"
  arguments = [str(runs), "--fractions=0.05,0.1", "--strategies=bis,random", "--seeds=0,1"]
  arguments += ["--", "--config=recipe.py", "--config.train.steps=3"]
  done = _script("sweep.sh", *arguments, RUN=run)
  calls = (tmp_path / "calls").read_text().splitlines()
  assert done.returncode == 1 and len(calls) == len(set(calls)) == 8
  assert (
    f"--config=recipe.py --config.train.steps=3 --workdir={runs}/bis_0.1_seed1 "
    "--config.selection.fraction=0.1 --config.selection.strategy=bis --config.seed=1"
  ) in calls
  failed = "random_0.05_seed0 random_0.05_seed1 random_0.1_seed0 random_0.1_seed1"
  assert f"4 failed: {failed}" in done.stderr
  assert (runs / "random_0.1_seed0.log").read_text() == "broken\n"
  for name in failed.split():
    (runs / f"{name}.fixed").touch()
  done = _script("sweep.sh", *arguments, RUN=run)
  calls = (tmp_path / "calls").read_text().splitlines()
  assert done.returncode == 0 and len(calls) == 12 and all("random" in c for c in calls[8:])


def test_a_sweep_of_lora_runs_passes_its_recipe_and_keys(tmp_path):
  """Every command line is a config that a run accepts."""
  run = _executable(tmp_path / "run", f'echo "$@" >> {tmp_path}/calls\n')
  arguments = [str(tmp_path / "runs"), "--fractions=0.1", "--strategies=bis,random", "--seeds=1"]
  arguments += ["--", "--config=configs/qwen_bis10_lora.py:toy", "--config.lora.rank=8"]
  assert _script("sweep.sh", *arguments, RUN=run).returncode == 0
  calls = (tmp_path / "calls").read_text().splitlines()
  assert len(calls) == 2 and all("--config.lora.rank=8" in call for call in calls)
  for call in calls:
    flags = [flag for flag in call.split() if not flag.startswith("--workdir=")]
    assert run_command("aot", *flags, "--memory=80GB") is None


def test_a_sweep_in_a_bucket_skips_the_finished_and_keeps_its_output_here(tmp_path, bucket):
  (bucket / "sweep/bis_0.1_seed0/evaluation.json").write_text("{}")
  sweep = subprocess.run(
    [ROOT / "launch/sweep.sh", f"{bucket}/sweep", "--fractions=0.1", "--strategies=bis,random"]
    + ["--seeds=0", "--", "--config=x"],
    cwd=tmp_path,
    env=os.environ
    | {
      "RUN": "echo",
      "PYTHONPATH": str(ROOT),
      "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    },
    capture_output=True,
    text=True,
  )
  assert sweep.returncode == 0, sweep.stderr
  assert "bis_0.1_seed0: already finished" in sweep.stdout
  assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
  (log,) = (tmp_path / "sweep").iterdir()
  assert f"--workdir={bucket}/sweep/random_0.1_seed0" in log.read_text()


def test_a_sweep_that_is_told_to_stop_stops_its_run_too(tmp_path):
  run = _executable(
    tmp_path / "run",
    f"trap 'echo saved >> {tmp_path}/calls; exit 75' TERM\necho started >> {tmp_path}/calls\n"
    "while true; do sleep 0.1; done\n",
  )
  command = ["launch/sweep.sh", str(tmp_path / "runs"), "--fractions=1", "--strategies=full,bis"]
  command += ["--seeds=0", "--", "--config=recipe.py"]
  sweep = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"RUN": run})
  try:
    deadline = time.monotonic() + 30
    while not (tmp_path / "calls").exists():
      assert time.monotonic() < deadline
      time.sleep(0.05)
    sweep.terminate()
    assert sweep.wait(timeout=30) == 75
  finally:
    sweep.kill()
  assert (tmp_path / "calls").read_text().split() == ["started", "saved"]


def _dry(name: str, *arguments: str) -> list[list[str]]:
  """Returns the commands that a script would run, as lists of words."""
  done = _script(name, *arguments)
  assert done.returncode == 0, done.stderr
  return [shlex.split(line) for line in done.stdout.splitlines()]


RUN = ["--config=configs/qwen_bis10.py", "--workdir=gs://BUCKET/a run"]


def test_a_tpu_pod_is_requested_installed_run_and_deleted():
  create, archive, copy, install, run, delete = _dry(
    "tpu_pod.sh", "pod", "ZONE", "v5p-32", "--spot", "--dry-run", "--before=do-it", "--", *RUN
  )
  queued = ["gcloud", "compute", "tpus", "queued-resources"]
  assert create[:5] == [*queued, "create"] and delete[:5] == [*queued, "delete"]
  assert {"--zone=ZONE", "--node-id=pod", "--accelerator-type=v5p-32", "--spot"} <= set(create)
  assert "--runtime-version=v2-alpha-tpuv5" in create and "--force" in delete
  assert archive[:2] == ["git", "archive"] and copy[4] == "scp"
  for command in (copy, install, run):
    assert command[:4] == queued and {"pod", "--node=all", "--worker=all"} <= {
      word.partition(":")[0] for word in command
    }
  assert "[tpu]" in install[-1] and "do-it" in install[-1]
  words = shlex.split(run[-1].removeprefix("--command="))
  assert words[-4:] == ["-m", "bis_jax.main", *RUN]


def test_several_slices_are_requested_and_used_as_one():
  create, _, _, _, run, _ = _dry(
    "tpu_pod.sh", "pod", "ZONE", "v6e-16", "--num-slices=2", "--dry-run", "--", *RUN
  )
  assert {"--node-count=2", "--node-prefix=pod"} <= set(create) and "--node-id=pod" not in create
  assert "--node=all" in run


def test_a_kept_tpu_pod_is_not_deleted_and_each_generation_has_its_image():
  arguments = ["--keep", "--dry-run", "--", *RUN]
  for accelerator, image in (
    ("v5litepod-64", "v2-alpha-tpuv5-lite"),
    ("v6e-16", "v2-alpha-tpuv6e"),
  ):
    commands = _dry("tpu_pod.sh", "pod", "ZONE", accelerator, *arguments)
    assert f"--runtime-version={image}" in commands[0]
    assert not any("delete" in command for command in commands)


GKE = ["gke_xpk.sh", "bis", "CLUSTER", "v6e-16", "--image=HOST/bis_jax"]


def test_a_gke_workload_runs_the_same_command():
  _, build, push, command = _dry(*GKE, "--restarts=3", "--num-slices=2", "--dry-run", "--", *RUN)
  image = push[-1]
  assert re.fullmatch("HOST/bis_jax:[0-9a-f]{12}", image) and f"--tag={image}" in build
  assert command[:3] == ["xpk", "workload", "create"]
  assert {"--workload=bis", "--cluster=CLUSTER", "--tpu-type=v6e-16"} <= set(command)
  assert {"--max-restarts=3", "--num-slices=2", f"--docker-image={image}"} <= set(command)
  words = shlex.split(command[-1].removeprefix("--command="))
  assert words == ["exec", "python", "-m", "bis_jax.main", *RUN], "nothing is installed in a pod"


def test_the_gke_image_of_a_commit_is_built_once(tmp_path):
  """Fake docker and xpk: the registry holds what was pushed."""
  log = f'echo "$0 $*" >> {tmp_path}/calls\n'
  _executable(
    tmp_path / "docker",
    f"{log}case $1 in\n  manifest) grep -q push {tmp_path}/calls ;;\n"
    f"  build) tar -tzf - > {tmp_path}/context ;;\nesac\n",
  )
  _executable(tmp_path / "xpk", log)
  for _ in range(2):
    done = _script(*GKE, "--", *RUN, PATH=f"{tmp_path}:{os.environ['PATH']}", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
  calls = [line.split()[:2] for line in (tmp_path / "calls").read_text().splitlines()]
  docker, xpk = str(tmp_path / "docker"), str(tmp_path / "xpk")
  first = [[docker, "manifest"], [docker, "build"], [docker, "push"], [xpk, "workload"]]
  assert calls == [*first, first[0], first[-1]]
  context = (tmp_path / "context").read_text().split()
  assert {"pyproject.toml", "bis_jax/main.py"} <= set(context)
