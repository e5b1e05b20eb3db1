"""Step-reward evaluation: benchmarks in, metrics, intervals, plots and pages out. Knows no model.

visual_process_bench.py  a benchmark folder -> checked `BenchmarkItem`s
step_metrics.py          labels and scores -> every measure, as pure numpy functions
step_evaluation.py       items and scores -> the content of evaluation.json
plots.py workdir_page.py evaluation and training history -> PNG files and index.html
"""
