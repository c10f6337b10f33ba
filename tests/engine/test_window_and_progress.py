import io
import json
import math
import re
import sys

import pytest
import torch

from drcnn.engine.progress import Display, MetricsFile, format_time
from drcnn.engine.window import LossWindow
from drcnn.errors import TrainingError

CPU = torch.device("cpu")


def test_window_means_and_reset():
    window = LossWindow(CPU)
    for step, value in enumerate((1.0, 2.0, 6.0), start=1):
        window.add(step, {"a": torch.tensor(value), "b": torch.tensor(-value)}, {})
    losses, extra, bad = window.read({"beta": torch.tensor(0.5)})
    assert losses == {"a": 3.0, "b": -3.0} and extra == {"beta": 0.5} and bad is None
    window.reset()
    window.add(4, {"a": torch.tensor(7.0), "b": torch.tensor(0.0)}, {})
    assert window.read({})[0] == {"a": 7.0, "b": 0.0}


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_window_remembers_the_first_bad_iteration(poison):
    window = LossWindow(CPU)
    for step in range(1, 6):
        window.add(step, {"a": torch.tensor(poison if step in (3, 5) else 1.0)}, {})
        window.reset()
    assert window.read({})[2] == 3


def test_window_lets_unchecked_values_be_infinite():
    window = LossWindow(CPU)
    window.add(1, {"a": torch.tensor(1.0)}, {"grad_norm": torch.tensor(math.inf)})
    losses, _, bad = window.read({})
    assert bad is None and losses["grad_norm"] == math.inf


def test_window_continues_from_its_state():
    whole, first, second = LossWindow(CPU), LossWindow(CPU), LossWindow(CPU)
    values = torch.rand(6)
    for step, value in enumerate(values):
        whole.add(step, {"a": value}, {})
        if step == 3:
            second.load_state_dict(first.state_dict())
        (first if step < 3 else second).add(step, {"a": value}, {})
    assert second.read({})[0] == whole.read({})[0]


def test_metrics_file_keeps_what_was_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (1, 2, 3):
        file.write({"step": step, "loss": math.nan if step == 2 else 1.5})
    file.close()
    with path.open("a") as torn:
        torn.write('{"step": 4, "lo')
    file = MetricsFile(path, keep=lambda record: record["step"] <= 2)
    file.write({"step": 3, "loss": 2.5})
    file.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records == [{"step": 1, "loss": 1.5}, {"step": 2, "loss": None}, {"step": 3, "loss": 2.5}]


@pytest.mark.parametrize(
    "torn", [b'{"step": 4, "lo', b"", b"\x00" * 99, b"\xff\xfe{", b"[]\n5\n{}\n", b'{"step": 4}']
)
def test_metrics_file_after_a_kill_at_any_byte(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    file = MetricsFile(path, keep=lambda record: record["step"] <= 2)
    file.write({"step": 3})
    file.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_file_keeps_a_whole_record_without_its_line_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}')
    MetricsFile(path, keep=lambda record: True).close()
    assert path.read_text() == '{"step": 1}\n'


def test_a_record_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(file._file, "_file", open("/dev/full", "wb", buffering=0))
    with pytest.raises(TrainingError, match=r"cannot write .*metrics\.jsonl: No space left on device; free"):
        file.write({"step": 1})
    file.close()
    with pytest.raises(TrainingError, match=r"cannot write .*metrics\.jsonl: "):
        MetricsFile(tmp_path / "metrics.jsonl" / "metrics.jsonl")


def test_plain_lines_away_from_a_terminal(tmp_path, capsys):
    display = Display(tmp_path / "log.txt", iterations=100)
    display.start()
    record = {"step": 20, "epoch": 1.0, "lr": 0.01, "loss": 1.25, "loss_box": 0.25, "iou_threshold": 0.4}
    record |= {"beta": 0.875, "time_per_step": 0.5, "data_time": 0.01, "memory_mb": 100.0}
    display.step(record)
    display.close()
    out = capsys.readouterr().out
    assert out == (tmp_path / "log.txt").read_text()
    for part in ("step 20/100", "loss 1.2500", "box 0.250", "T_now 0.400", "beta_now 0.875", "2.00 it/s"):
        assert part in out
    assert out.rstrip().endswith("100 MB  ETA 0:00:40")


def test_silent_display_says_nothing(tmp_path, capsys):
    display = Display(tmp_path / "log.txt", iterations=1, silent=True)
    display.say("hello")
    display.close()
    assert capsys.readouterr().out == "" and not (tmp_path / "log.txt").exists()


def test_format_time():
    assert format_time(59.6) == "0:01:00"
    assert format_time(90061) == "1 d 1:01:01"


def test_live_bar_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    display = Display(tmp_path / "log.txt", iterations=40)
    display.start()
    record = {"step": 20, "lr": 0.01, "loss": 1.25, "beta": 0.875, "time_per_step": 0.5}
    display.step(record | {"data_time": 0.01, "memory_mb": 100.0})
    display.evaluation("val", 3, 6)
    display.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    last = shown[shown.rindex("train ") :]
    for part in ("20/40", "2.00 it/s", "ETA 0:00:10", "eval val", "3/6", "loss 1.2500  beta_now 0.875"):
        assert part in last
    assert (tmp_path / "log.txt").read_text().startswith("step 20/40  loss 1.2500")
