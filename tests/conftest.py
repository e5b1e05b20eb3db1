"""Eight fake CPU devices, strict ranks and exact float32 products in every test.

Every program is compiled fast, and once for all processes and, for a week, for later sessions.
"""

import contextlib
import os
import pathlib
import shutil
import time

from tests.xla_flags import FAST_COMPILATION

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count=8 {FAST_COMPILATION}"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # all other processes inherit the first one's
  programs = pathlib.Path.home() / ".cache" / "bis_jax_tests"
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs)
  for file in programs.glob("*"):
    with contextlib.suppress(FileNotFoundError):  # another session's turn
      if time.time() - file.stat().st_mtime > 7 * 24 * 3600:
        file.unlink()
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import io  # noqa: E402
import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import types  # noqa: E402

import jax  # noqa: E402  (the flags above must be set before jax is imported)
import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402
from etils import epath  # noqa: E402
from hypothesis import settings  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
from PIL import Image  # noqa: E402

from bis_jax.compilation import program_cache  # noqa: E402
from bis_jax.corpus.score_table import PAPER_OK, STRICT_OK  # noqa: E402
from tests.bucket_server import BucketServer  # noqa: E402
from tests.commands import run_command  # noqa: E402
from tests.tables import table_from_steps  # noqa: E402

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
flags.FLAGS.mark_as_parsed()  # commands run in process with their defaults
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config):
  """Commands in processes of their own run without torch, as most users': half the time to start.

  Mutation caught: a command that needs torch.
  """
  if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
    folder = str(pathlib.Path(__file__).with_name("without_torch"))
    sys.path.append(folder)  # some tests make PYTHONPATH of it
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """The folder of real tokenizers and images beside the checkout; skips where it is absent."""
  folder = pathlib.Path(__file__).resolve().parents[2] / "shared"
  if not folder.is_dir():
    pytest.skip("reads real tokenizers and images from ../shared, which is not here")
  return folder


@pytest.fixture(scope="session")
def bucket_server():
  """A local Google Cloud Storage with the bucket bis-jax; all processes started here use it."""
  server = BucketServer()
  server.start()
  server.make_bucket("bis-jax")
  os.environ.update(server.environment)
  yield server
  server.stop()


@pytest.fixture
def bucket(bucket_server, tmp_path) -> epath.Path:
  """An empty folder gs://bis-jax/NAME of one test."""
  return epath.Path("gs://bis-jax") / tmp_path.name


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> str:
  """A folder for corpora and pre-trained backbones, the same in all workers of a session."""
  folder = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    folder = folder.parent
  (folder / "cache").mkdir(exist_ok=True)
  return str(folder / "cache")


@pytest.fixture(scope="session")
def small_config(shared_cache):
  """The toy recipe on a thousand rollouts with the smallest model: a run of seconds."""
  from configs import qwen_bis10

  c = qwen_bis10.get_config("toy")
  c.corpus.cache, c.corpus.workers = shared_cache, 1
  c.train.compile_cache = ""  # commands in other processes, too, share the session's
  c.corpus.toy.rollouts, c.corpus.toy.images, c.corpus.toy.benchmark_items = 1000, 300, 24
  c.model.size = "tiny"
  c.pretrain.steps = 2
  c.train.global_batch, c.train.epochs, c.train.steps = 8, 2, 6
  c.train.log_every, c.train.checkpoint_every = 1, 2
  c.evaluation.blank_images, c.evaluation.every, c.evaluation.dev_rollouts = False, 0, 0
  return c.lock()


@pytest.fixture(scope="session", autouse=True)
def _one_cache_of_programs():
  """Runs share the session's compiled programs: with folders of their own each compiles anew.

  The folder that a run names stays JAX's for all later tests of the process, too.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(program_cache, "use", lambda folder: None)
    yield


@pytest.fixture(scope="module")
def own_programs():
  """Runs of a file of tests keep their compiled programs in the folder that the config names."""
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_enable_xla_caches")
  before = {name: getattr(jax.config, name) for name in names}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(program_cache, "use", _USE_PROGRAMS)
    yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


_USE_PROGRAMS = program_cache.use


@pytest.fixture(scope="module")
def whole_arrays():
  """Orbax writes each array whole, as where no device has a copy of what another one has.

  Otherwise every device writes its part of what all hold, and each part is cut out by a program of
  its own: 168 of them for the smallest model. Runs in processes of their own, and those in buckets,
  save in that way.
  """
  handler = ocp.type_handlers.get_type_handler(jax.Array)
  with pytest.MonkeyPatch.context() as patch:
    name = "_min_slice_bytes_for_replica_parallel"
    patch.setattr(handler, name, 2**20, raising=False)
    yield


@pytest.fixture(scope="module")
def programs_once(whole_arrays):
  """Runs of one config in a file of tests trace and lower each of their programs once."""
  from bis_jax.scoring import step_scorer
  from bis_jax.settings import keys
  from bis_jax.training import loop

  made = {}

  def text(part):
    if isinstance(part, ConfigDict):  # no program depends on what is left out
      settings = keys.flatten(part)
      left_out = ("corpus.", "evaluation.", "selection.", "train.compile_cache")
      left_out += ("train.profile_steps", "train.checkpoint_every", "train.log_every", "pretrain.")
      left_out += () if settings.get("labels.kind") == "beta" else ("labels.",)
      return str({key: settings[key] for key in settings if not key.startswith(left_out)})
    return str(part) if isinstance(part, dict) else part

  def once(function):
    def call(*arguments, **options):
      key = (function, *map(text, arguments), *options.items())
      if key not in made:
        made[key] = function(*arguments, **options)
      return made[key]

    return call

  with pytest.MonkeyPatch.context() as patch:
    for module, name in ((loop, "step_of"), (step_scorer, "make_score_step")):
      patch.setattr(module, name, once(getattr(module, name)))
    yield


@pytest.fixture(scope="module")
def no_plots():
  """The plots of pages are empty files; tests/reports and whole commands draw them."""
  from bis_jax.reports import plot_style

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plot_style, "png_bytes", lambda figure: b"")
    yield


SOURCES = ("MMMU", "MathVision", "MathVerse_VO", "DynaMath", "WeMath")


def benchmark_record(i: int) -> dict:
  """A line of test.jsonl; every third item has two images."""
  return {
    "image": [f"images/{i}_{k}.png" for k in range(1 + (i % 3 == 2))],
    "question": f"<image1> What is in picture {i}?",
    "answer": str(i),
    "response": {
      "steps": [f"step {j} of {i}" for j in range(2 + i % 4)],
      "process_correctness": [(1, -1, 1, 0, 1)[j] for j in range(2 + i % 4)],
    },
    "policy_model": f"model-{i % 2}",
    "data_source": SOURCES[i % 5],
    "a key nobody knows": None,
  }


def write_benchmark(folder: pathlib.Path, records: list[dict]) -> pathlib.Path:
  """Writes records as test.jsonl, and the images of ten `benchmark_record`s, into `folder`."""
  (folder / "images").mkdir(parents=True, exist_ok=True)
  for i in range(10):
    for k in range(2):
      Image.new("RGB", (40 + 10 * k, 30), (20 * i, 100, 50)).save(folder / f"images/{i}_{k}.png")
  lines = [json.dumps(record) for record in records]
  (folder / "test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
  return folder


@pytest.fixture(name="benchmark_record")
def _benchmark_record():
  """`benchmark_record`."""
  return benchmark_record


@pytest.fixture(name="write_benchmark")
def _write_benchmark():
  """`write_benchmark`."""
  return write_benchmark


@pytest.fixture
def benchmark(tmp_path) -> pathlib.Path:
  """A folder with ten items in VisualProcessBench's layout."""
  return write_benchmark(tmp_path / "benchmark", [benchmark_record(i) for i in range(10)])


@pytest.fixture
def random_run():
  """random_run(seed, n_items) -> (items, scores): labels, neutral steps, ties, five sources."""

  def draw(seed: int, n_items: int = 60):
    rng = np.random.default_rng(seed)
    items, scores = [], []
    for i in range(n_items):
      labels = rng.choice([1, -1, 0], rng.integers(1, 9), p=[0.55, 0.35, 0.1])
      noisy = np.clip(0.5 + 0.2 * labels + rng.normal(0, 0.3, len(labels)), 0, 1)
      items.append(
        types.SimpleNamespace(
          labels=tuple(labels.tolist()),
          data_source=SOURCES[rng.integers(5)],
          policy_model=f"model-{i % 3}",
        )
      )
      scores.append(np.round(noisy, 2) if i % 2 else noisy)
    return items, scores

  return draw


@pytest.fixture
def command():
  """command("bis_jax.select", "--out=x") runs a command in this process -> CompletedProcess."""

  def run(name: str, *arguments) -> subprocess.CompletedProcess:
    with (
      contextlib.redirect_stdout(io.StringIO()) as out,
      contextlib.redirect_stderr(errors := io.StringIO()),
    ):
      try:
        ended = run_command(name.removeprefix("bis_jax."), *map(str, arguments))
      except flags.Error as error:
        ended = str(error)
    code = ended if isinstance(ended, int) else int(ended is not None)
    err = errors.getvalue() + (f"{ended}\n" if isinstance(ended, str) else "")
    return subprocess.CompletedProcess([name, *arguments], code, out.getvalue(), err)

  return run


@pytest.fixture(scope="session")
def browse(tmp_path_factory):
  """browse(file or address, fragment="") -> (DOM after scripts, console messages) in Chromium."""
  program = shutil.which("chromium") or shutil.which("google-chrome")
  if program is None:
    pytest.skip("opens a page in a real browser, and there is no chromium on PATH")

  def open_page(page: pathlib.Path | str, fragment: str = "") -> tuple[str, list[str]]:
    address = page if isinstance(page, str) else page.resolve().as_uri()
    run = subprocess.run(
      [
        program,
        *"--headless --no-sandbox --disable-gpu --disable-quic --no-first-run".split(),
        *"--disable-background-networking --disable-component-update --disable-sync".split(),
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
        "--dump-dom",
        *(["--virtual-time-budget=5000"] if isinstance(page, str) else []),  # for its requests
        address + fragment,
      ],
      capture_output=True,
      text=True,
      timeout=60,
      check=True,
    )
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]

  return open_page


def _table_of(
  rollouts, *, continuations=-1, source=None, line=None, names=("a",), flags=None, **rest
):
  rows = len(rollouts)
  scores = np.array([s for rollout in rollouts for s in rollout], float)
  return table_from_steps(
    names,
    source=np.zeros(rows, int) if source is None else np.array(source),
    line=np.arange(rows) if line is None else np.array(line),
    lengths=np.array([len(r) for r in rollouts], int),
    scores=scores,
    totals=np.full(scores.size, continuations),
    flags=np.full(rows, STRICT_OK | PAPER_OK) if flags is None else np.array(flags),
    **rest,
  )


@pytest.fixture(scope="session")
def table_of():
  """Builds a table of one valid rollout per list of MC scores, all in source "a" by default.

  The number of continuations is not stated unless given, an integer or one per step.
  """
  return _table_of
