"""Checkpoints whose files have changed: each is noticed, and the one before it is taken."""

import gc
import shutil
import warnings

import chex
import jax
import jax.numpy as jnp
import pytest

import resflow_jax as rf
from resflow_jax.io.checksums import CHECKSUMS
from resflow_jax.training.checkpoint_errors import DamagedCheckpointError
from resflow_jax.training.checkpoints import Checkpoints
from tests.training.test_checkpoints import CERTIFICATE, state

LIKE = jax.tree.map(jnp.zeros_like, state(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three checkpoints; the second is the best."""
    directory = tmp_path_factory.mktemp("saved")
    with Checkpoints(directory) as checkpoints:
        for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0)]:
            checkpoints.save(state(step), loss, CERTIFICATE)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of them, to be damaged."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def flip(path, bit=77):
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def files_of(directory, step):
    found = [path for path in (directory / str(step)).rglob("*") if path.is_file()]
    return sorted(path for path in found if path.name not in (CHECKSUMS, "_CHECKPOINT_METADATA", "commit_success.txt"))


def test_every_file_has_a_checksum(saved):
    """Those of the arrays, of their shapes and names, of the loss and of the certificate."""
    with Checkpoints(saved) as checkpoints, warnings.catch_warnings(action="error"):
        assert checkpoints.latest_step == 3 and checkpoints.best_step == 2
        chex.assert_trees_all_equal(checkpoints.restore_intact(LIKE), state(3))
        chex.assert_trees_all_equal(checkpoints.restore_intact(LIKE, weights="best"), state(2))
    text = (saved / "3" / CHECKSUMS).read_text()
    for path in files_of(saved, 3):
        assert f'"{path.relative_to(saved / "3").as_posix()}"' in text
    assert "state/d/" in text and "metrics/metrics" in text and "certificate/metadata" in text


def test_a_changed_bit_of_any_file_is_noticed(copy):
    """Of every file of the newest checkpoint one bit, and the file: both times the one before is taken, and named."""
    for path in files_of(copy, 3):
        for change in (flip, lambda path: path.unlink()):
            content = path.read_bytes()
            change(path)
            named = rf"checkpoint 3 is damaged, its file {path.relative_to(copy / '3').as_posix()} .*step 2 is taken"
            with Checkpoints(copy) as checkpoints:
                with pytest.raises(DamagedCheckpointError, match=r"could not read checkpoint 3 in .*: it is damaged"):
                    checkpoints.restore(3, LIKE)
                with pytest.warns(UserWarning, match=named):
                    found = checkpoints.restore_intact(LIKE)
            chex.assert_trees_all_equal(found, state(2))
            path.write_bytes(content)
    flip(copy / "3" / CHECKSUMS)
    with Checkpoints(copy) as checkpoints, pytest.warns(UserWarning, match=f"its file {CHECKSUMS} cannot be read|SHA"):
        chex.assert_trees_all_equal(checkpoints.restore_intact(LIKE), state(2))


def test_the_best_of_the_others(copy):
    """A damaged loss does not choose; neither does a damaged state. Of a damaged certificate the step is named."""
    (copy / "3" / "metrics" / "metrics").write_text('{"loss": 0.5}')
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.best_step == 2
    flip(copy / "2" / "state" / "_METADATA")
    with Checkpoints(copy) as checkpoints:
        with pytest.raises(DamagedCheckpointError, match=r"got none: checkpoint 2 is damaged, .*; checkpoint 3 is"):
            checkpoints.restore_intact(LIKE, weights="best")
        assert checkpoints.certificate(2)["is_certified"] is False
        flip(copy / "2" / "certificate" / "metadata")
        with pytest.raises(DamagedCheckpointError, match=r"could not read checkpoint 2 .* certificate/metadata has"):
            checkpoints.certificate(2)
    assert sorted(path.name for path in copy.iterdir()) == ["2", "3"], "something was deleted"


def test_metrics_that_are_no_json(copy):
    """The other checkpoints can be opened, and the damaged one is named."""
    (copy / "2" / "metrics" / "metrics").write_bytes(b'{"loss": \xb8')
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.best_step == 3 and checkpoints.validation_loss(3) == 2.0
        chex.assert_trees_all_equal(checkpoints.restore_intact(LIKE, weights="best"), state(3))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads that orbax gives up
def test_without_checksums(copy):
    """Checkpoints of earlier versions are restored; what cannot be read is skipped too."""
    for step in (2, 3):
        (copy / str(step) / CHECKSUMS).unlink()
    with Checkpoints(copy) as checkpoints, warnings.catch_warnings(action="error"):
        chex.assert_trees_all_equal(checkpoints.restore_intact(LIKE), state(3))
    (copy / "3" / "state" / "manifest.ocdbt").unlink()
    with Checkpoints(copy) as checkpoints, pytest.warns(UserWarning, match="checkpoint 3 is unreadable, .*step 2 is"):
        chex.assert_trees_all_equal(checkpoints.restore_intact(LIKE), state(2))
    gc.collect()  # what they leave


def test_another_flow_is_no_damage(copy):
    """The error of a wrong structure comes as it is."""
    other = LIKE._replace(params={"other": jnp.zeros(3)})
    with Checkpoints(copy) as checkpoints, pytest.raises(ValueError) as caught:
        checkpoints.restore_intact(other)
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_training_goes_on_after_a_damaged_checkpoint(copy):
    """The damaged one is kept aside, also a second time, and its step can be saved again."""
    for _ in range(2):
        flip(copy / "3" / "state" / "_METADATA")
        with Checkpoints(copy) as checkpoints:
            with pytest.warns(UserWarning, match="step 2 is taken instead"):
                found = checkpoints.restore_intact(LIKE)
            checkpoints.set_aside_after(int(found.step))
            assert checkpoints.latest_step == 2
            checkpoints.save(state(3), 2.0, CERTIFICATE)
    with Checkpoints(copy) as checkpoints, warnings.catch_warnings(action="error"):
        chex.assert_trees_all_equal(checkpoints.restore_intact(LIKE), state(3))
    assert {path.name for path in (copy / "aside").iterdir()} == {"3", "3-1"}


def test_none_that_can_be_read(tmp_path):
    """Neither in an empty directory."""
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(DamagedCheckpointError, match="got none: there is none"):
        checkpoints.restore_intact(LIKE)


@pytest.mark.parametrize("where", ["arrays", "names", "texts"])
def test_a_saved_flow_that_has_changed(tmp_path, where):
    """A changed bit of an array, of its name or of the metadata is an error of the file."""
    path = tmp_path / "flow.safetensors"
    rf.save(path, rf.Flow(rf.ActNorm((3,)), rf.StandardNormal((3,))))
    content = bytearray(path.read_bytes())
    at = {"arrays": len(content) - 1, "names": content.index(b'"shape"') + 10, "texts": content.index(b"0.1.0")}[where]
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"flow.safetensors: expected"):
        rf.load(path)
