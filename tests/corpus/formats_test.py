"""Every format of a corpus in every container gives the same rollouts."""

import zipfile

import numpy as np
import pytest

from bis_jax.corpus import containers, formats, records
from bis_jax.corpus.containers import sources
from bis_jax.corpus.corpus import Corpus
from bis_jax.corpus.preparation import prepare
from bis_jax.corpus.reading import AnnotationError
from bis_jax.corpus.scan import scan
from tests.record_formats import (
  CONTAINERS,
  COUNT,
  WRITTEN,
  as_conversations,
  as_prm800k,
  as_raw,
  as_trl,
  expected,
  lines,
  parquet,
  solutions,
)


def rollouts_of(path, **options):
  found = scan(path, **options)
  rows = np.flatnonzero(found.strict)
  rollouts = [
    records.parse_rollout(records.load_object(raw), "x", line)
    for raw, line in zip(found.read_lines(rows), found.columns.line[rows].tolist(), strict=True)
  ]
  return found, rollouts


def contents(rollouts):
  return [(r.question, r.steps, r.scores, r.measured) for r in rollouts]


@pytest.mark.parametrize("name", WRITTEN)
def test_every_format_gives_the_same_rollouts(write_files, name):
  rows = [WRITTEN[name](*solution) for solution in solutions()]
  found, rollouts = rollouts_of(write_files({"x.jsonl": lines(rows)}))
  assert not found.rejections
  assert contents(rollouts) == expected(name)
  assert [rollout.line for rollout in rollouts] == [*range(COUNT)]


@pytest.mark.parametrize("file", CONTAINERS)
@pytest.mark.parametrize("name", ["raw", "trl", "prm800k"])
def test_every_container_gives_the_same_rollouts(write_files, name, file):
  rows = [WRITTEN[name](*solution) for solution in solutions()]
  if name == "trl" and file.endswith((".parquet", ".arrow")):  # a column has one type
    rows = [row | {"labels": [float(y) for y in row["labels"]]} for row in rows]
  found, rollouts = rollouts_of(write_files({file: CONTAINERS[file](rows)}))
  assert not found.rejections
  assert contents(rollouts) == expected(name)


def test_folders_and_zips_may_mix_formats_and_containers(write_files, caplog):
  caplog.set_level("INFO", "bis_jax")
  files = {
    f"{at}-{name}{file[1:]}": CONTAINERS[file](
      [WRITTEN[name](*solution) for solution in solutions(at)]
    )
    for at, (name, file) in enumerate(
      [("raw", "x.jsonl"), ("openrlhf", "x.json"), ("dataset", "x.parquet")]
    )
  }
  files |= {"dataset_info.json": b'{"features": {}}'}  # beside annotations, and none
  folder = write_files(files)
  with zipfile.ZipFile(folder.parent / "all.zip", "w") as archive:
    for name, data in files.items():
      archive.writestr(f"annotations/{name}", data)
  found, rollouts = rollouts_of(folder)
  assert [file.source for file in found.files] == ["0-raw", "1-openrlhf", "2-dataset"]
  wanted = [*expected("raw", 0), *expected("openrlhf", 1), *expected("dataset", 2)]
  assert contents(rollouts) == wanted
  assert "1-openrlhf.json: openrlhf records" in caplog.text
  assert contents(rollouts_of(folder.parent / "all.zip")[1]) == wanted


BAD = [
  ({"prompt": "q", "completions": ["a"], "labels": [True, False]}, "wrong_label_count", "1 steps"),
  ({"prompt": "q", "completions": ["a", " "], "labels": [1, 0]}, "empty_step", "step 1"),
  ({"prompt": "q", "completions": ["a"], "labels": ["yes"]}, "score_not_a_number", "'yes'"),
  ({"prompt": "q", "completions": ["a"], "labels": [2]}, "score_out_of_range", "2"),
  ({"prompt": [{"role": "user"}], "completions": ["a"], "labels": [1]}, "not_text", "list"),
  ({"prompt": "q", "completions": ["a"], "label": [1]}, "other_format", "label, prompt"),
  ({"prompt": "<image> q", "completions": ["a"], "labels": [1]}, "no_image", ""),
]


@pytest.mark.parametrize("file", ["x.jsonl", "x.json"])
def test_wrong_records_are_named_with_line_and_key(write_files, file):
  good = as_trl(*solutions()[0])
  rows = [good, *(record for record, _, _ in BAD), "text", good | {"prompt": "another"}]
  data = CONTAINERS[file](rows)
  if file == "x.jsonl":
    data = data.replace(b'"text"\n', b"{broken\n")
  found, rollouts = rollouts_of(write_files({file: data}))
  last = "not_json" if file == "x.jsonl" else "not_an_object"
  assert [(bad.line, bad.reason) for bad in found.rejections] == [
    *((at, reason) for at, (_, reason, _) in enumerate(BAD, 1)),
    (len(BAD) + 1, last),
  ]
  for bad, (_, _, shown) in zip(found.rejections, BAD, strict=False):
    assert shown in bad.detail, bad
  assert found.records == len(rows)


def test_a_format_that_nobody_knows_is_an_error_with_the_keys(write_files):
  folder = write_files({"x.jsonl": lines([{"problem": "q", "solution": "a"}])})
  with pytest.raises(AnnotationError, match="keys problem, solution; the formats are raw .*trl"):
    sources(folder)
  (file,) = sources(folder, "trl")  # as asked
  assert file.format == "trl"


def test_a_wrong_guess_can_be_overridden(write_files):
  """A record that two formats could read."""
  both = as_trl(*solutions()[0]) | as_conversations(*solutions()[1])
  folder = write_files({"x.jsonl": lines([both])})
  assert contents(rollouts_of(folder)[1]) == expected("conversations")[1:2]
  assert contents(rollouts_of(folder, format="trl")[1]) == expected("trl")[:1]


def test_neutral_ratings_are_one_half_without_counts():
  record = as_prm800k("q", ["a", "b"], [1, 0])
  record["label"]["steps"][1]["completions"][0]["rating"] = 0
  steps = formats.converted(record, "prm800k")["steps_with_score"]
  assert steps[1] == {"step": "b", "score": formats.NEUTRAL}


def test_images_in_columns_and_by_path(tmp_path, write_files, png):
  red, blue = png(colour=(255, 0, 0)), png(colour=(0, 0, 255))
  embedded = [{"bytes": red, "path": "r.png"}, {"bytes": blue, "path": "b.png"}]
  rows = [as_trl(*solution) | {"images": []} for solution in solutions()[:6]]
  rows[0]["images"], rows[1]["images"] = embedded[:1], embedded
  rows[2]["images"] = [{"bytes": None, "path": "a/1.png"}]
  rows[3]["images"] = embedded[:1]
  for row in rows:
    row["labels"] = [float(y) for y in row["labels"]]
  folder = write_files({"x.parquet": parquet(rows, groups=2), "images/a/1.png": png(4, 4)})
  corpus = prepare(folder / "x.parquet", folder / "images", tmp_path / "corpus", workers=1)
  assert len(corpus) == 6 and not corpus.stats["rejected"]
  stored = [corpus.images(corpus.image_ids(i)) for i in range(6)]
  assert stored == [[red], [red, blue], [png(4, 4)], [red], [], []]
  assert len(corpus.image_sizes) == 3
  assert not [*tmp_path.glob("*.images*")]


def test_rollouts_of_text_alone_need_no_image_root(tmp_path, write_files):
  rows = [as_trl(*solution) for solution in solutions()]
  corpus = prepare(write_files({"x.jsonl": lines(rows)}), None, tmp_path / "corpus", workers=1)
  assert isinstance(corpus, Corpus) and len(corpus) == COUNT
  assert corpus.image_sizes.shape == (0, 2)
  assert contents(corpus.rollouts(range(COUNT))) == expected("trl")
  assert corpus.rollout(0).images == () == corpus.rollout(0).image_ids


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch, write_files):
  rows = [as_trl(*solution) for solution in solutions()]
  folder = write_files({"data/train.jsonl": lines(rows), "README.md": b"# card"})
  (folder / "README.md").unlink()  # not among the files that are asked for
  asked = []
  monkeypatch.setattr(
    "huggingface_hub.snapshot_download", lambda name, **kw: asked.append((name, kw)) or str(folder)
  )
  monkeypatch.chdir(tmp_path)
  (file,) = sources("trl-lib/prm800k")
  assert (file.name, file.format) == ("train.jsonl", "trl")
  name, options = asked[0]
  assert name == "trl-lib/prm800k" and "*.parquet" in options["allow_patterns"]


def test_a_damaged_table_is_named(write_files):
  rows = [as_trl(*solution) for solution in solutions()]
  for row in rows:
    row["labels"] = [float(y) for y in row["labels"]]
  folder = write_files({"x.parquet": parquet(rows)[:-20]})
  with pytest.raises(AnnotationError, match=r"x\.parquet.* is damaged"):
    sources(folder)


@pytest.mark.parametrize("name", ["raw", "dataset"])
def test_tables_are_read_by_columns_with_the_same_result(write_files, monkeypatch, name):
  """Mutation caught: a step of white space, a wrong count or a missing image passes the columns."""
  rows = [WRITTEN[name](*solution) for solution in solutions()]
  rows[3]["image"], rows[4]["image"] = "a/1.png", "../up.png"
  rows[5]["question"] = "<image> what?"
  rows[9] = rows[8]
  if name == "raw":
    rows[6]["steps_with_score"][0]["step"] = " \u3000"
    rows[7]["steps_with_score"][0]["score"] = 0.25
  else:
    rows[6]["steps"] = [" \u3000", *rows[6]["steps"][1:]]
    rows[7]["mc_scores"] = [0.25, *rows[7]["mc_scores"][1:]]
  folder = write_files({"x.parquet": parquet([{"image": None} | row for row in rows])})
  fast, of_fast = rollouts_of(folder)
  reasons = {bad.line: bad.reason for bad in fast.rejections}
  assert reasons == {
    4: "image_outside_root",
    5: "no_image",
    6: "empty_step",
    7: "count_mismatch",
    9: "duplicate_line",
  }
  with monkeypatch.context() as patch:
    patch.setattr(containers.ConvertedFile, "in_columns", False)
    slow, of_slow = rollouts_of(folder)
  assert of_fast == of_slow and len(of_fast) == COUNT - len(reasons)
  assert fast.rejections == slow.rejections
  for column in ("line", "offset", "length", "steps", "correct", "total", "scores", "flags"):
    one, other = getattr(fast.columns, column), getattr(slow.columns, column)
    assert (one == other).all(), column
  assert len(set(fast.columns.group.tolist())) == len(set(slow.columns.group.tolist()))


def test_steps_on_which_two_completers_disagree_are_unmeasured(write_files):
  record = as_raw("q", ["a", "b", "c", "d"], [1, 0, 1, 0])
  for step, second in zip(record["steps_with_score"], (0.5, 0.25, 0, 0.0), strict=True):
    step["strong"] = second
  bad = as_raw("q2", ["a"], [1])
  found, (rollout,) = rollouts_of(
    write_files({"x.jsonl": lines([record, bad])}), agreement="strong"
  )
  assert rollout.measured == (True, False, False, True) and rollout.scores == (1.0, 0.0, 0.0, 0.0)
  assert [(bad.line, bad.reason) for bad in found.rejections] == [(1, "missing_score")]
  assert "strong is None" in found.rejections[0].detail


def test_images_in_columns_are_written_beside_a_subset(tmp_path, write_files, png, command):
  red, blue = png(colour=(255, 0, 0)), png(colour=(0, 0, 255))
  rows = [as_trl(*solution) for solution in solutions()[:6]]
  for at, row in enumerate(rows):
    row["images"] = [{"bytes": red if at % 2 else blue, "path": "x.png"}]
    row["labels"] = [float(y) for y in row["labels"]]
  folder = write_files({"x.parquet": parquet(rows)})
  out = tmp_path / "out/subset.jsonl"
  flags = ["--strategy=full", "--fraction=1", "--format=trl", f"--out={out}"]
  done = command("bis_jax.select", f"--annotations={folder}", *flags)
  assert done.returncode == 0 and "2 images stored in columns are in" in done.stdout, done
  corpus = prepare(out, out.with_name("subset.images"), tmp_path / "corpus", workers=1)
  stored = [corpus.images(corpus.image_ids(i)) for i in range(6)]
  assert stored == [[blue], [red]] * 3
