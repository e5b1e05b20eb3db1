"""Every file of a checkpoint damaged in every way: an older one serves, or an error names it."""

import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from bis_jax.errors import UserError
from bis_jax.parallel.sharding import make_mesh
from bis_jax.training import checkpoint
from bis_jax.training.checkpoint import Checkpoints, DamagedCheckpointError
from bis_jax.training.train_state import TrainState

MESH = make_mesh(2, 2, 2)
SPECS = {"a": PartitionSpec("fsdp"), "b": PartitionSpec(None, "tensor"), "c": PartitionSpec()}


def _on_mesh(name: str, array) -> jax.Array:
  return jax.device_put(array, NamedSharding(MESH, SPECS[name]))


def _params(seed: int) -> dict[str, jax.Array]:
  rng = np.random.default_rng(seed)
  dtypes = {"a": jnp.float32, "b": jnp.bfloat16, "c": jnp.float16}
  return {k: _on_mesh(k, rng.normal(size=(64, 8)).astype(d)) for k, d in dtypes.items()}


def _state(step: int) -> TrainState:
  return TrainState(_on_mesh("c", jnp.int32(step)), _params(step), {"count": _params(9)["c"]})


def _shapes(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _equal(one, other) -> bool:
  return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def _open(folder) -> Checkpoints:
  return Checkpoints(epath.Path(folder), every=1, keep=2)


FROZEN = {"vision": _on_mesh("a", np.random.default_rng(0).normal(size=(64, 64)))}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("saved") / "run"
  with _open(folder) as checkpoints:
    checkpoints.save_frozen(FROZEN)
    for step in (2, 4):
      checkpoints.save(step, _state(step), FROZEN)
  return folder


WAYS = {
  "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
  "emptied": lambda path: path.write_bytes(b""),
  "deleted": lambda path: path.unlink(),
  "flipped": lambda path: path.write_bytes(_flipped(path.read_bytes())),
}


def _flipped(content: bytes) -> bytes:
  middle = len(content) // 2
  return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_newest_checkpoint_is_left_for_an_older_one(saved, tmp_path, caplog, way):
  fell_back = 0
  for file in sorted((saved / "checkpoints" / "4").rglob("*")):
    if not file.is_file():
      continue
    folder = tmp_path / f"{fell_back}-{file.name}"
    shutil.copytree(saved, folder)
    WAYS[way](folder / file.relative_to(saved))
    caplog.clear()
    shapes = _shapes(_state(0))
    try:
      step, params = checkpoint.restore_params(epath.Path(folder), shapes.params, _shapes(FROZEN))
      assert step == 4 and _equal(params, _params(4) | FROZEN), file
    except DamagedCheckpointError as error:
      assert str(error).startswith(f"{folder}/checkpoints/4 is damaged (") and "\n" not in str(
        error
      )
    with _open(folder) as checkpoints:
      state = checkpoints.restore(shapes)
      assert _equal(state, _state(int(state.step))), file
      if int(state.step) == 2:
        fell_back += 1
        assert "resuming from step 2" in caplog.text
        assert [path.name[:2] for path in (folder / "damaged").iterdir()] == ["4-"]
        checkpoints.save(4, _state(4), FROZEN)
    if fell_back == 1:
      with _open(folder) as checkpoints:
        assert int(checkpoints.restore(shapes).step) == 4
    shutil.rmtree(folder)
  assert fell_back >= 3


def test_all_damaged_is_an_error_and_moves_nothing(saved, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(saved, folder)
  for manifest in folder.glob("checkpoints/*/state/manifest.ocdbt"):
    manifest.write_bytes(b"")
  with _open(folder) as checkpoints, pytest.raises(DamagedCheckpointError, match="put a copy"):
    checkpoints.restore(_shapes(_state(0)))
  assert not (folder / "damaged").exists()


def test_a_checkpoint_without_checksums_opens(saved, tmp_path):
  """As those of f92436b."""
  shutil.copytree(saved, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "4" / "checksums")
  with _open(tmp_path / "run") as checkpoints:
    assert int(checkpoints.restore(_shapes(_state(0))).step) == 4


@pytest.mark.parametrize("way", WAYS)
def test_damaged_frozen_parameters_are_made_again(saved, tmp_path, caplog, way):
  folder, shapes = tmp_path / "run", _shapes(FROZEN)
  shutil.copytree(saved, folder)
  data = max(folder.glob("frozen/**/d/*"), key=lambda path: path.stat().st_size)
  WAYS[way](data)
  with pytest.raises(DamagedCheckpointError, match=f"{folder}/frozen is damaged"):
    checkpoint.restore_params(epath.Path(folder), _shapes(_params(0)), shapes)
  with _open(folder) as checkpoints:
    checkpoints.restore(_shapes(_state(0)))
    with pytest.raises(DamagedCheckpointError):
      checkpoints.restore_frozen(shapes, lambda: {"vision": FROZEN["vision"] + 1})
    assert _equal(checkpoints.restore_frozen(shapes, lambda: FROZEN), FROZEN)
  assert "made it again" in caplog.text
  assert _equal(checkpoint._restore_frozen(epath.Path(folder), shapes, {}), FROZEN)


def test_a_full_disk_is_named_and_the_next_start_completes(saved, tmp_path, capfd):
  folder, state = tmp_path / "run", _state(6)
  shutil.copytree(saved, folder)
  large = state._replace(params={"a": jnp.asarray(np.random.default_rng(0).normal(size=10**5))})
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
  try:
    words = rf"no space left to write {folder}/checkpoints: .* bytes are free"
    with pytest.raises(UserError, match=words), _open(folder) as checkpoints:
      checkpoints.save(6, large, FROZEN)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
  assert "Traceback" not in capfd.readouterr().err
  with _open(folder) as checkpoints:
    assert int(checkpoints.restore(_shapes(_state(0))).step) == 4
    checkpoints.save(6, large, FROZEN)
  assert not list(folder.glob("checkpoints/*tmp*"))


def test_a_disk_that_is_too_small_is_named_before_the_first_step(tmp_path, monkeypatch):
  monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
  with _open(tmp_path) as checkpoints:
    with pytest.raises(UserError, match="1 bytes are free there, 21,508 bytes are needed"):
      checkpoints.check_room(_shapes(_state(0)), _shapes(FROZEN), 1)
    checkpoints.check_room(_shapes(_state(0)), {}, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8"])
def test_a_checksum_depends_on_every_bit_and_not_on_the_sharding(dtype):
  array = np.arange(64, dtype=np.float32).reshape(16, 4).astype(jnp.dtype(dtype))
  whole = checkpoint.checksums({"x": jnp.asarray(array)})
  for spec in (PartitionSpec("data"), PartitionSpec(("data", "fsdp"), "tensor")):
    assert checkpoint.checksums({"x": jax.device_put(array, NamedSharding(MESH, spec))}) == whole
  for byte in range(0, array.nbytes, 7):
    for bit in (0, 7):
      other = array.copy()
      other.view(np.uint8).reshape(-1)[byte] ^= 1 << bit
      assert checkpoint.checksums({"x": jnp.asarray(other)}) != whole


def test_a_bucket_that_fails_for_a_while_is_survived_and_a_checkpoint_in_it_is_not_called_damaged(
  bucket, bucket_server
):
  """Seconds of 503 and torn uploads are; a refusal ends with a sentence, and nothing is moved."""
  state = _state(2)
  for fault in ({"status": 503}, {"cut": True}):
    with bucket_server.failing(name="ocdbt", times=3, **fault), _open(bucket) as checkpoints:
      checkpoints.save(3 if "cut" in fault else 2, state, FROZEN)
  with pytest.raises(OSError, match="gs://bis-jax.*(Forbidden|can't be reached)"):
    with bucket_server.failing(name="ocdbt", status=403), _open(bucket) as checkpoints:
      checkpoints.save(4, state, FROZEN)
  shapes = _shapes(state)
  with _open(bucket) as checkpoints:
    with bucket_server.failing(name="/d/", status=403):
      with pytest.raises(OSError, match="can't be reached .PERMISSION_DENIED: "):
        checkpoints.restore(shapes)
    assert _equal(checkpoints.restore(shapes).params, state.params)
  assert not (bucket / "damaged").exists()
