"""The command `python -m bis_jax.select`, run as a person runs it."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

from bis_jax.selection.manifest import Manifest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def run(command):
  return functools.partial(command, "bis_jax.select")


def record(name, *scores):
  steps = [{"step": f"s{i}", "score": s} for i, s in enumerate(scores)]
  return {"image": f"{name}.png", "question_orig": "q", "steps_with_score": steps}


# Line, and whether strict order takes it; "b" has the highest BIS of all but one bad record.
LINES = [
  (record("a", 1.0, 1.0), True),
  (record("b", 1.0, 0.0), True),
  (record("c", 3.0, 0.0), False),  # a score outside [0, 1]: the paper's builder ranks and keeps it
  (record("d", 0.5, 0.0), True),
  (record("e", 1.0, 0.5, None), False),
  (record("f", 0.25), True),
]


@pytest.fixture
def annotations(tmp_path):
  folder = tmp_path / "annotations"
  folder.mkdir()
  text = "".join(json.dumps(line) + "\n" for line, _ in LINES)
  (folder / "one.jsonl").write_text(text + "{not json\n")
  (folder / "two.jsonl").write_text(text)
  return folder


def images(path):
  return [json.loads(line)["image"][0] for line in path.read_text().splitlines()]


def test_strict_order_keeps_valid_records_and_lists_the_others(tmp_path, annotations):
  """As a process of its own, which never starts jax."""
  done = subprocess.run(
    [sys.executable, "-m", "bis_jax.select", f"--annotations={annotations}", "--fraction=0.5"]
    + [f"--out={tmp_path / 'subset.jsonl'}"],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "none"},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  assert images(tmp_path / "subset.jsonl") == ["b", "d", "b", "d"]
  assert "bis keeps 4 of 8 rollouts" in done.stdout
  manifest = Manifest.load(tmp_path / "subset.manifest.json")
  assert {s.name: s.lines.tolist() for s in manifest.sources} == {"one": [1, 3], "two": [1, 3]}
  rejected = (tmp_path / "subset.rejections.jsonl").read_text().splitlines()
  found = [(r["source"], r["line"], r["reason"]) for r in map(json.loads, rejected)]
  bad = [(2, "score_out_of_range"), (4, "missing_score")]
  assert found == [
    *(("one", *b) for b in bad),
    ("one", 6, "not_json"),
    *(("two", *b) for b in bad),
  ]


def test_paper_order_ranks_first_and_drops_afterwards(tmp_path, annotations, run):
  out = tmp_path / "subset.jsonl"
  done = run(f"--annotations={annotations}", "--fraction=0.5", "--order=paper", f"--out={out}")
  assert done.returncode == 0, done.stderr
  # ranked: c, b, then a (0.2), e (0.2 * 0.75), d (0.225) ...: c, b and d are the top three
  assert images(out) == ["b", "c", "d"] * 2


def test_a_zip_gives_the_same_bytes_and_a_kept_table_the_same_manifest(tmp_path, annotations, run):
  with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
    for path in sorted(annotations.iterdir()):
      archive.write(path, f"annotations/{path.name}")
  table = tmp_path / "table.npz"
  first = run(f"--annotations={annotations}", f"--out={tmp_path / '1.jsonl'}", f"--table={table}")
  second = run(f"--annotations={tmp_path / 'a.zip'}", f"--out={tmp_path / '2.jsonl'}")
  third = run("--format=manifest", f"--out={tmp_path / '3.json'}", f"--table={table}")
  assert [done.returncode for done in (first, second, third)] == [0, 0, 0]
  assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
  digests = {
    Manifest.load(tmp_path / name).digest
    for name in ("1.manifest.json", "2.manifest.json", "3.json")
  }
  assert len(digests) == 1
  (annotations / "two.jsonl").write_text(json.dumps(LINES[0][0]) + "\n")
  stale = run(f"--annotations={annotations}", f"--out={tmp_path / '4.jsonl'}", f"--table={table}")
  assert stale.returncode == 1
  assert "table.npz is of other annotations" in stale.stderr
  assert not (tmp_path / "4.jsonl").exists()
  other = run("--format=manifest", f"--out={tmp_path / '5.json'}", f"--table={table}", "--tau=0.5")
  assert other.returncode == 0 and Manifest.load(tmp_path / "5.json").tau == 0.5


def test_adaptive_lists_the_rollouts_whose_sampling_may_stop(tmp_path, run):
  def line(correct, total):
    step = {"step": "s", "score": correct / total, "num_mc_correct": correct, "num_mc_total": total}
    return json.dumps({"image": "a.png", "question": "q", "steps_with_score": [step, step]})

  (tmp_path / "geo.jsonl").write_text(
    "\n".join(line(*pair) for pair in [(4, 4), (0, 2), (0, 3), (1, 2)])
  )
  out, options = tmp_path / "stop.json", ("--count=1", "--adaptive=4")
  done = run(f"--annotations={tmp_path / 'geo.jsonl'}", f"--out={out}", *options)
  assert done.returncode == 0, done.stderr
  # BIS in the end: 0.2; up to 0.225 if one step is right twice; at most 0.2, but later; at most 0.15
  assert json.loads(out.read_text()) == {"continuations": 4, "stopped": {"geo": [2, 3]}}
  assert "6 of 10 continuations need not be sampled" in done.stdout
  assert [path.name for path in tmp_path.glob("stop*")] == ["stop.json"]


def test_images_that_are_not_there_reject_their_records(tmp_path, annotations, run):
  root = tmp_path / "images"
  root.mkdir()
  for name in "acdef":
    (root / f"{name}.png").touch()
  out = tmp_path / "subset.jsonl"
  done = run(f"--annotations={annotations}", f"--images={root}", "--fraction=0.5", f"--out={out}")
  assert done.returncode == 0, done.stderr
  assert images(out) == ["d", "d"], "b has no image; one of three is kept"
  assert "missing_image" in done.stdout


def test_dataset_and_report_folders(tmp_path, annotations, run):
  done = run(
    f"--annotations={annotations}",
    "--format=dataset",
    "--none_positive=0",
    f"--out={tmp_path / 'ds'}",
    f"--report={tmp_path / 'report'}",
  )
  assert done.returncode == 0, done.stderr
  assert {p.name for p in (tmp_path / "ds").iterdir()} == {
    "README.md",
    "data",
    "manifest.json",
    "rejections.jsonl",
  }
  page = (tmp_path / "report" / "index.html").read_text()
  assert "Selection by bis" in page and "R 0 without a positive step" in page
  assert Manifest.load(tmp_path / "ds" / "manifest.json").reliability_if_no_positive == 0
  assert "| none_positive | 0.0 |" in (tmp_path / "ds" / "README.md").read_text()


def test_what_is_there_is_left_alone_unless_told_otherwise(tmp_path, annotations, run):
  out = tmp_path / "subset.jsonl"
  out.write_text("mine\n")
  done = run(f"--annotations={annotations}", f"--out={out}")
  assert done.returncode == 1 and "--overwrite" in done.stderr
  assert out.read_text() == "mine\n"
  manifest = run(f"--annotations={annotations}", f"--out={tmp_path / 'other.jsonl'}")
  assert manifest.returncode == 0
  (tmp_path / "other.jsonl").unlink()
  again = run(f"--annotations={annotations}", f"--out={tmp_path / 'other.jsonl'}")
  assert again.returncode == 1 and "other.manifest.json exists" in again.stderr
  assert run(f"--annotations={annotations}", f"--out={out}", "--overwrite").returncode == 0
  assert images(out) == ["b", "b"]


@pytest.mark.parametrize("form", ["raw", "dataset"])
def test_a_failed_selection_does_not_refuse_its_retry(
  tmp_path, annotations, run, monkeypatch, form
):
  """Mutation caught: what the failed one wrote is taken for another's file."""
  arguments = [f"--annotations={annotations}", f"--out={tmp_path / 'x'}", f"--format={form}"]

  def fail(*_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(Manifest, "save", fail)
    failed = run(*arguments)
  assert failed.returncode == 1 and "No space left" in failed.stderr
  assert not (tmp_path / "x").exists()
  assert run(*arguments).returncode == 0
  manifest = Manifest.load(
    tmp_path / ("x/manifest.json" if form == "dataset" else "x.manifest.json")
  )
  assert manifest.placeholders == ("removed" if form == "dataset" else "kept")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--strategy=best"], "unknown strategy 'best': choose one of bis, full, random"),
    (["--fraction=1.5"], "it must be in (0, 1]"),
    (["--annotations=nowhere"], "no annotations at"),
    (["--annotations=", "--out="], "name the file to write with --out=FILE"),
    (["--annotations="], "name the annotations with --annotations"),
    (["--annotations=", "--format=manifest", "--table=none.npz"], "no score table at none.npz"),
    (["extra"], "unexpected argument 'extra'"),
  ],
)
def test_bad_input_is_named(tmp_path, annotations, arguments, message, run):
  done = run(f"--annotations={annotations}", f"--out={tmp_path / 'x.jsonl'}", *arguments)
  assert done.returncode == 1
  assert message in done.stderr
  assert not (tmp_path / "x.jsonl").exists()


def test_annotations_without_a_usable_record_are_named(tmp_path, run):
  (tmp_path / "annotations").mkdir()
  (tmp_path / "annotations/empty.jsonl").write_text("{}\n\n")
  done = run(f"--annotations={tmp_path / 'annotations'}", f"--out={tmp_path / 'x.jsonl'}")
  assert done.returncode == 1
  assert "no rollout can be ranked in strict order: check the annotations" in done.stderr


def test_the_command_does_not_wait_for_jax():
  """Nor for libraries that a selection from a table does not use."""
  unused = {"jax", "matplotlib", "fsspec", "jinja2", "PIL", "tqdm", "zstandard", "numpy.random"}
  code = f"import sys, bis_jax.select; sys.exit(bool({unused} & {{*sys.modules}}))"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
