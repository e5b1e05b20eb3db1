"""Step-reward evaluation: benchmarks and scores in, metrics and intervals out. Knows no model."""
