import dataclasses
import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from drcnn import presets
from drcnn.config import Config, apply_overrides, flags, from_dict, load_config, print_field_help, to_dict
from drcnn.dynamics import DynamicTrainingConfig, FixedTrainingConfig
from drcnn.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.fixture
def config(tiny_data):
    return Config(presets.dynamic(presets.light_faster_rcnn(4)), tiny_data)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_file_survives_json(path):
    config = load_config(path)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_there_are_config_files():
    assert {"bccd", "bccd_baseline", "r50_fpn_1x", "r101_fpn_2x"} <= {p.stem for p in CONFIGS}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.num-classes", "7"],
        ["--model.num_classes", "7"],
        ["--model.num-classes=7"],
        ["--model.num_classes=7"],
        ["--model.num-classes", "3", "--model.num-classes", "7"],
    ],
)
def test_a_flag_sets_a_field_in_each_spelling(config, arguments):
    assert apply_overrides(config, arguments).model.num_classes == 7


def test_flags_of_all_types(config):
    changed = apply_overrides(
        config,
        [
            "--data.short-sides", "64", "96",
            "--optim.clip-norm", "None",
            "--optim.lr", "1e-3",
            "--train.amp", "bf16",
            "--data.no-aspect-grouping",
            "--model.training.window", "10",
        ],
    )  # fmt: skip
    assert changed.data.short_sides == (64, 96) and changed.data.aspect_grouping is False
    assert changed.optim.clip_norm is None and changed.optim.lr == 1e-3
    assert changed.train.amp == "bf16" and changed.model.training.window == 10
    assert isinstance(changed.model.training, DynamicTrainingConfig)
    assert dataclasses.replace(changed.data, short_sides=(64,), aspect_grouping=True) == config.data


def test_every_listed_flag_is_accepted_and_helped(config):
    said = io.StringIO()
    with redirect_stdout(said):
        print_field_help(config, "drcnn train")
    for flag in flags(config):
        assert flag in said.getvalue(), flag
    assert "Learning rate for" in said.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.num-clases", "3"], "unknown flag --model.num-clases; did you mean --model.num-classes?"),
        (["--optim.learning_rate=1"], "unknown flag --optim.learning_rate; "),
        (["--lr", "0.1"], "unknown flag --lr; did you mean --optim.lr?"),
        (["--xyzzy", "0.1"], "unknown flag --xyzzy; --help lists the flags"),
        (["--data.synthetic.images", "3"], "the config file leaves its group at None"),
        (["--optim.lr", "fast"], "--optim.lr must be a number, got fast"),
        (
            ["--optim.lr", "0.1", "--optim.iterations", "2.5"],
            "--optim.iterations must be a whole number, got 2.5",
        ),
        (["--model.num_classes=x"], "--model.num_classes must be a whole number, got x"),
        (["--optim.lr"], "--optim.lr must be a number, got nothing"),
        (["--train.amp", "fp8"], "--train.amp must be one of off, bf16, fp16, got fp8"),
        (["--optim.clip-norm", "x"], "--optim.clip-norm must be a number or None, got x"),
        (["--data.short-sides", "64", "x"], "each a whole number, got 64 x"),
        (["--model.pixel-mean", "1", "2"], "--model.pixel-mean must be 3 values, each a number, got 1 2"),
        (["--data.aspect-grouping", "False"], "write --data.aspect-grouping or --data.no-aspect-grouping"),
        (["3", "--optim.lr", "0.1"], "unexpected argument '3'"),
        (["--optim.lr", "-1"], "optim.lr must be positive, got -1"),
    ],
)
def test_wrong_flags_are_one_line(config, arguments, message):
    with pytest.raises(ConfigError) as error:
        apply_overrides(config, arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def write(tmp_path, text):
    path = tmp_path / "experiment.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", r"experiment\.py must define config = drcnn\.config\.Config\(\.\.\.\), found none"),
        ("config = 3\n", "found one of type int"),
        ("x = 1\ny = z\n", r"experiment\.py, line 2: NameError: name 'z'"),
        ("x = (\n", r"experiment\.py, line 1: SyntaxError"),
        (
            "from drcnn.engine.optim import OptimConfig\nOptimConfig(lr=0)\n",
            r"experiment\.py: optim\.lr must be",
        ),
    ],
)
def test_bad_config_files_are_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_missing_config_file_names_the_nearest():
    with pytest.raises(ConfigError, match=r"r50_fpm_1x\.py does not exist; did you mean .*r50_fpn_1x\.py\?"):
        load_config(CONFIGS[0].parent / "r50_fpm_1x.py")


@pytest.mark.parametrize(
    "kind", ["os.path", "subprocess.Popen", "drcnnx.Config", None, "drcnn.config.load_config"]
)
def test_stored_types_from_elsewhere_are_refused(kind):
    with pytest.raises(ConfigError, match=r"not one of drcnn|not a config of drcnn"):
        from_dict({"_type": kind, "args": "true"})


def test_stored_fields_that_are_gone_are_named():
    plain = to_dict(FixedTrainingConfig())
    with pytest.raises(ConfigError, match=r"FixedTrainingConfig\.alpha, which this drcnn does not have"):
        from_dict(plain | {"alpha": 1})
    with pytest.raises(ConfigError, match=r"drcnn\.dynamics\.training\.Gone, which this drcnn does not have"):
        from_dict({"_type": "drcnn.dynamics.training.Gone"})
