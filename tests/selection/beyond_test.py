"""Strategies that are not of the paper, and the user's own."""

import dataclasses
import sys
import types

import numpy as np
import pytest

from bis_jax.errors import UserError
from bis_jax.selection import bis, semdedup
from bis_jax.selection.rule import Rule, select
from examples.own_strategy import largest_fall


def kept(manifest):
  return {s.name: s.lines.tolist() for s in manifest.sources}


def score(table, strategy, **options):
  rule = Rule(strategy, fraction=0.5, **options)
  return rule.scores(table, table.statistics(rule.tau, rule.unmeasured))


def test_a_question_is_not_kept_thrice_before_others(table_of):
  """BIS alone keeps the three best, of one question."""
  rollouts = [[1, 0], [0.9, 0], [0.8, 0], [0.7, 0], [1, 1], [0.5, 0]]
  table = dataclasses.replace(table_of(rollouts), group=np.array([5, 5, 5, 7, 7, 9], np.uint64))
  assert kept(select(table, strategy="bis", count=3))["a"] == [0, 1, 2]
  # 0.45, 0.405 / 2, 0.36 / 3, 0.315, 0.2 / 2, 0.225
  assert kept(select(table, strategy="bis_grouped", count=3))["a"] == [0, 3, 5]
  assert score(table, "bis_grouped")[[1, 2, 4]] == pytest.approx([0.2025, 0.12, 0.1])
  with pytest.raises(UserError, match="does not say which rollouts have the same question"):
    select(table_of(rollouts), strategy="bis_grouped", count=3)


def test_rollouts_that_are_not_ranked_take_no_place_of_their_question(table_of):
  table = table_of([[1, 0], [0.5, 0], [0.4, 0]], flags=[0, 3, 3])
  table = dataclasses.replace(table, group=np.array([5, 5, 9], np.uint64))
  assert score(table, "bis_grouped") == pytest.approx([-np.inf, 0.225, 0.18])
  assert score(table, "bis_by_position").tolist() == [-np.inf, -0.25, -0.75]


def test_places_of_the_first_error_are_kept_in_proportion(table_of):
  rng = np.random.default_rng(0)
  first_error = rng.integers(0, 11, 3000)  # 10: no error
  rollouts = [
    np.where(np.arange(10) < at, rng.integers(1, 17, 10) / 16, 0).tolist() for at in first_error
  ]
  for chosen in ("bis", "bis_by_position"):
    lines = kept(select(table_of(rollouts), strategy=chosen, fraction=0.1))["a"]
    counts = np.bincount(first_error[lines] // 2, minlength=6) / np.bincount(first_error // 2)
    if chosen == "bis":
      assert counts.max() > 0.2 and counts.min() < 0.01, "some places are kept often, some never"
    else:
      assert np.abs(counts - 0.1).max() < 0.005
  # Within a place, the best by BIS.
  at_two = np.flatnonzero(first_error // 2 == 2)
  scores = score(table_of(rollouts), "bis")[at_two]
  assert scores[np.isin(at_two, lines)].min() >= scores[~np.isin(at_two, lines)].max()


def test_ignored_steps_are_no_first_error(table_of):
  table = table_of([[0.5, 0.0, 0.5, 0.5, 0.5]], continuations=[16, 0, 16, 16, 16])
  assert score(table, "bis_by_position", unmeasured="ignore").tolist() == [-0.5]


@pytest.mark.parametrize("tau", [0.0, 0.25])
def test_posterior_is_the_mean_over_continuations_sampled_anew(table_of, tau):
  """p (1 - p) and the mean score of the positive steps, of 200,000 draws of theta and K'."""
  rng, total = np.random.default_rng(0), 16
  counts = np.array([0, 1, 9])
  theta = rng.beta(counts + 0.5, total - counts + 0.5, (200_000, 3))
  drawn = rng.binomial(total, theta) / total
  positive = drawn > tau
  p = positive.mean(1)
  none = (~positive).all(1).mean()
  reliability = (1 - none) * drawn[positive].sum() / positive.sum() + none
  expected = ((p * (1 - p)).mean() + 0.2) * reliability
  table = table_of([(counts / total).tolist()], continuations=total)
  assert score(table, "bis_posterior", tau=tau)[0] == pytest.approx(expected, rel=0.01)


def test_posterior_of_exact_scores_is_bis(table_of):
  rng = np.random.default_rng(0)
  rollouts = [(rng.integers(0, 9, 5) / 8).tolist() for _ in range(50)]
  found = score(table_of(rollouts), "bis_posterior")
  assert found == pytest.approx(score(table_of(rollouts), "bis"), rel=1e-12)
  many = score(table_of(rollouts, continuations=248), "bis_posterior", tau=0.3)
  few = score(table_of(rollouts, continuations=8), "bis_posterior", tau=0.3)
  exact = score(table_of(rollouts), "bis", tau=0.3)
  assert np.abs(many - exact).mean() < 0.2 * np.abs(few - exact).mean()


def test_one_of_sixteen_counts_for_less_than_its_label(table_of):
  table = table_of([[1.0, 1 / 16], [1.0, 0.0]], continuations=16)
  point, posterior = score(table, "mixture_only"), score(table, "bis_posterior", alpha=0.0)
  assert point.tolist() == [0.0, 0.25]
  assert 0 < posterior[0] < posterior[1] < 0.25 * bis.reliability(np.array([1]), np.array([1.0]))[0]


def encode(texts):
  """Embeds a text by its number of a's and b's."""
  return np.array([[text.count("a"), text.count("b"), 1.0] for text in texts])


def line(text):
  return (
    f'{{"image": "i", "question": "{text}", "steps_with_score": [{{"step": "{text}"}}]}}'.encode()
  )


def test_semdedup_keeps_one_of_rollouts_with_the_same_text(table_of):
  texts = ["aaaa", "bbbb", "aaaa", "abab", "bbbb", "aaaa"]
  table = table_of([[1.0]] * 6)
  table = dataclasses.replace(table, embedding=semdedup.embed(map(line, texts), encode))
  lines = kept(select(table, strategy="semdedup", count=3))["a"]
  assert sorted(texts[at] for at in lines) == ["aaaa", "abab", "bbbb"]
  with pytest.raises(UserError, match="no embeddings: .* --encoder=MODEL"):
    select(table_of([[1.0]] * 6), strategy="semdedup", count=3)


def test_semdedup_scores_are_those_of_all_pairs(table_of, monkeypatch):
  monkeypatch.setattr(semdedup, "_BATCH", 7)
  monkeypatch.setattr(semdedup, "_OF_CLUSTER", 50)
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(100, 8)) + 4 * (np.arange(100)[:, None] < 50)
  table = dataclasses.replace(table_of([[1.0]] * 100), embedding=semdedup._unit(vectors))
  found = score(table, "semdedup")
  unit = table.embedding.astype(np.float32)
  nearest, similarity = semdedup._clusters(unit, np.random.default_rng(0))
  assert len(set(nearest[:50])) == 1 and nearest[0] != nearest[50]
  for row in range(100):
    before = [i for i in range(100) if nearest[i] == nearest[row]]
    before = [i for i in before if (similarity[i], i) < (similarity[row], row)]
    most = max((float(unit[row] @ unit[i]) for i in before), default=-1.0)
    assert found[row] == pytest.approx(1 - most, abs=1e-5)


def test_sentence_transformers_is_loaded_when_asked_for(monkeypatch):
  fake = types.ModuleType("sentence_transformers")
  fake.SentenceTransformer = lambda name: types.SimpleNamespace(encode=lambda texts: (name, texts))
  monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
  assert semdedup.encoder("all-MiniLM-L6-v2")(["x"]) == ("all-MiniLM-L6-v2", ["x"])
  monkeypatch.setitem(sys.modules, "sentence_transformers", None)
  with pytest.raises(UserError, match=r"pip install 'bis_jax\[semdedup\]'"):
    semdedup.encoder("all-MiniLM-L6-v2")


def test_a_strategy_of_the_user(table_of):
  own = f"{largest_fall.__module__}:largest_fall"
  table = table_of([[1, 0.25, 0.25], [0.5], [0, 1, 0.5], [1, 0]], continuations=4)
  assert score(table, own).tolist() == [0.75, 0, 0.5, 1]
  assert kept(select(table, devices=True, strategy=own, count=2)) == {"a": [0, 3]}
  half = table_of([[1, 0.0, 0.75], [0.0]], continuations=[4, 0, 4, 0])
  assert score(half, own, unmeasured="ignore").tolist() == [0.25, -np.inf]
  assert score(table_of([[1 / 3, 0.0]]), own).tolist() == [1 / 3], "counts are unknown"


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("no.module:score", "no function no.module:score .* name an importable MODULE:FUNCTION"),
    ("examples.own_strategy:none", "no function examples.own_strategy:none"),
    ("builtins:print", "returned scores of shape .* for 2 rollouts"),
  ],
)
def test_a_strategy_that_is_none_is_named(table_of, name, message):
  with pytest.raises(UserError, match=message):
    select(table_of([[1.0], [0.5]], continuations=4), strategy=name, count=1)
