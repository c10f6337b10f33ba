"""Fixtures shared by all tests."""

from pathlib import Path

import pytest
import torch

from drcnn.data import DataConfig, SplitConfig, SyntheticConfig, make_synthetic


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """One thread keeps sums in one order and small operators fast."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets, beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real data sets in {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory) -> Path:
    """Root of a small synthetic data set: 12 train, 6 val and 3 test images of 64 to 96 px, 4 classes.

    Its files are ``images/SPLIT/*.jpg`` and ``annotations/instances_SPLIT.json``. Do not change them.
    """
    root = tmp_path_factory.mktemp("data") / "tiny"
    make_synthetic(
        root, SyntheticConfig(images=12, val_images=6, test_images=3, size=(64, 96), objects=(1, 3))
    )
    return root


@pytest.fixture
def tiny_data(tiny_coco) -> DataConfig:
    """A data config of ``tiny_coco``: batches of 4, short side 64, read in the test's own process."""
    train, val, test = (
        SplitConfig(f"images/{s}", f"annotations/instances_{s}.json") for s in ("train", "val", "test")
    )
    return DataConfig(
        root=str(tiny_coco),
        train=train,
        val=val,
        test=test,
        batch_size=4,
        workers=0,
        short_sides=(64,),
        max_size=96,
        test_short_side=64,
        test_max_size=96,
        pad_step=32,
    )
