"""Installs bis_jax: `pip install -e .`, with extras `tpu`, `cuda` and `test`."""

from setuptools import find_packages, setup

_SERVE = ["starlette>=0.40", "uvicorn>=0.30"]  # bis_jax.serve

setup(
  name="bis_jax",
  version="0.1.0",
  description="Train multimodal process reward models in JAX from a tenth of the data.",
  long_description=open("README.md", encoding="utf-8").read(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  packages=find_packages(include=["bis_jax", "bis_jax.*"]),
  package_data={
    "bis_jax": ["reports/*.css", "reports/*.js", "hub/templates/*.md", "models/*/*.md"]
  },
  python_requires=">=3.11",
  install_requires=[
    "absl-py>=2.1",
    "flax>=0.12.1",
    "grain>=0.2.15",
    "huggingface_hub>=1.0",
    "importlib_resources>=6.0",  # TFDS without TensorFlow imports it but does not declare it
    "jax>=0.10",
    "jinja2>=3.1",  # chat templates of the tokenizers
    "matplotlib>=3.9",
    "ml_collections>=1.0",
    "ml_dtypes>=0.5",
    "msgspec>=0.19",
    "numpy>=2.0",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.30",
    "pillow>=11.0",
    "protobuf>=5.0",  # sentencepiece reads its models with it but does not declare it
    "safetensors>=0.6",
    "scipy>=1.13",
    "sentencepiece>=0.2",  # InternLM2.5's tokenizer
    "tensorboardX>=2.6.4",  # event files without TensorFlow
    "tensorflow-datasets>=4.9.9",
    "tokenizers>=0.22",
    "tqdm>=4.67",
    "transformers>=5.0",
    "zstandard>=0.23",
  ],
  extras_require={
    "beam": ["apache-beam>=2.60"],
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    "serve": _SERVE,
    "test": [
      *_SERVE,
      "hypothesis>=6.100",
      # The TPU compiler, which needs no TPU.
      "jax[tpu]; platform_system == 'Linux' and platform_machine == 'x86_64'",
      "pytest>=8.0",
      "pytest-xdist>=3.6",
      "ruff>=0.14",
      "scikit-learn>=1.5",
      "torch==2.13.0",
    ],
  },
)
