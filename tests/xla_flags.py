"""XLA flags of all tests: the suite compiles far more than it computes."""

import importlib.metadata

FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):
  # Halves the time of compilation. Later releases have no other way to make kernels, and stop at
  # a flag that they do not know.
  FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
