"""Step-reward evaluation: benchmarks and scores in, metrics and intervals out. Knows no model.

benchmarks.py            finds a benchmark by folder or hub id -> checked `BenchmarkItem`s
visual_process_bench.py  the layout of VisualProcessBench, images included
process_bench.py         the layout of ProcessBench, text only
score_files.py           step scores as JSON lines, from any model
json_records.py          checks of JSON records, shared by all readers here
step_metrics.py          every metric of labels and scores, as pure NumPy functions
step_evaluation.py       items and scores -> the content of evaluation.json
best_of_n.py             candidates and their step scores -> pass@N, votes, picks
"""
