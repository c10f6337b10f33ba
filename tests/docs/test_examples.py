"""What the docs write down exists: verbs, flags, fields, configs, and Python that compiles and imports."""

import ast
import importlib
import re
import shlex
import textwrap
from itertools import pairwise
from pathlib import Path

import pytest

from drcnn import presets, sparse_presets
from drcnn.cli import VERBS
from drcnn.config import Config, flags
from drcnn.dynamics import DynamicTrainingConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)

IDS = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return [textwrap.dedent(text) for _, kind, text in FENCE.findall(page.read_text()) if kind == language]


@pytest.fixture(scope="module")
def fields() -> set[str]:
    """Fields of all kinds of detectors, as dotted names."""
    masks = presets.dynamic(presets.mask_rcnn())
    sparse = sparse_presets.dynamic_sparse_rcnn()
    models = (
        masks,
        presets.cascade_rcnn(),
        presets.retinanet(),
        presets.fcos(),
        sparse,
        sparse_presets.sparse_rcnn(),
    )
    found = set().union(*(flags(Config(model, presets.coco())) for model in models))
    return {flag[2:].replace("-", "_") for flag in found}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_name_verbs_and_fields_that_exist(page, fields):
    wrong = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            verbs = [word[6:] for word in words if word.startswith("drcnn.")]
            verbs += [b for a, b in pairwise(words) if a == "drcnn" and words[0] != "git"]
            wrong += [f"drcnn {verb}" for verb in verbs if verb not in VERBS]
            dotted = [w.partition("=")[0] for w in words if w.startswith("--") and "." in w and verbs]
            wrong += [word for word in dotted if word[2:].replace("-", "_") not in fields]
            named = [w for w in words if w.startswith("configs/") and w.endswith(".py") and "{" not in w]
            wrong += [word for word in named if not (ROOT / word).is_file()]
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_flags_and_configs_in_the_text_exist(page, fields):
    text = FENCE.sub("", page.read_text())
    dotted = re.findall(r"--((?:model|data|optim|train)\.[\w.-]+?)[` ,]", text)
    wrong = [name for name in dotted if not name.endswith(".") and name.replace("-", "_") not in fields]
    named = re.findall(r"`(?:configs/)?(\w+_(?:1x|2x|3x|6x|voc)\.py)`", text)
    wrong += [name for name in named if not (ROOT / "configs" / name).is_file()]
    assert not wrong


@pytest.mark.parametrize("page", ["from_mmdetection.md", "from_detectron2.md"])
def test_fields_that_other_systems_names_are_put_beside_exist(page, fields):
    rows = [
        line.split("|") for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("|")
    ]
    named = [n for row in rows for n in re.findall(r"`((?:model|data|optim|train)\.\w[\w.]*)`", row[2])]
    assert len(named) > 50
    assert not [name for name in named if name not in fields]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_imports_what_is_there(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "drcnn":
                module = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "presets"
            ):
                assert hasattr(presets, node.attr)


def test_configs_of_the_pages_can_be_made():
    for page in ("own_data.md", "dynamic_rcnn.md", "dynamic_scale_training.md", "dynamic_sparse_rcnn.md"):
        for block in blocks(ROOT / "docs" / page, "python"):
            if "presets" in block or ("Config" in block and "import" in block):
                exec(block, {})


def test_every_coco_config_has_a_number_to_reproduce_or_is_known_to_have_none():
    text = (ROOT / "docs" / "reproduce.md").read_text().replace("{small,medium,large}", "small")
    without = {
        "cascade_rcnn_r50_fpn_1x.py",
        "cascade_mask_rcnn_r50_fpn_1x.py",
        "dst_dynamic_rcnn_r50_fpn_1x.py",
        "retinanet_r50_fpn_1x.py",
        "faster_rcnn_r50_fpn_mstrain_medium_1x.py",
        "faster_rcnn_r50_fpn_mstrain_large_1x.py",
        "x101_32x8d_fpn_1x.py",
        "x101_32x8d_dcnv2_fpn_mstrain_3x.py",
    }
    configs = {
        path.name for path in (ROOT / "configs").glob("*.py") if re.search(r"_(\dx|voc)\.py$", path.name)
    }
    assert {name for name in configs if name not in text} == without


def test_the_readings_of_dynamic_training_are_as_the_page_says():
    paper, mmdet, author = (getattr(DynamicTrainingConfig, name)() for name in ("paper", "mmdet", "author"))
    assert (paper.iou_threshold, mmdet.iou_threshold, author.iou_threshold) == (0.4, 0.5, 0.4)
    assert (paper.error_of, mmdet.error_of, author.error_of) == ("positives", "sampled_positives", "all")
    assert (paper.min_beta, mmdet.keep_beta_below, author.min_beta) == (1e-3, 1e-15, 0.0)
