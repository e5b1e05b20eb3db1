"""The packages: configs/, which people edit at the top level, is installed as bis_jax/configs."""

from setuptools import find_namespace_packages, setup

setup(
  packages=[*find_namespace_packages(include=["bis_jax", "bis_jax.*"]), "bis_jax.configs"],
  package_dir={"bis_jax.configs": "configs"},
)
