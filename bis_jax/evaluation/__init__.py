"""Step-reward evaluation: benchmarks in, metrics, intervals, plots and pages out. Knows no model.

benchmarks.py            a folder or hub id -> checked `BenchmarkItem`s, by layout:
visual_process_bench.py  VisualProcessBench, images and all; process_bench.py  text items
score_files.py           anyone's step scores as JSON lines
step_metrics.py          labels and scores -> every measure, as pure numpy functions
step_evaluation.py       items and scores -> the content of evaluation.json, with intervals
best_of_n.py             candidates and their step scores -> pass@N, votes, picks
plots.py workdir_page.py page_style.py    PNG files and index.html of a run
"""
