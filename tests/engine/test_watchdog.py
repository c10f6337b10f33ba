import threading
import time

import pytest

from drcnn.engine.run_config import TrainConfig
from drcnn.engine.watchdog import Watchdog
from drcnn.errors import ConfigError


def test_it_says_what_is_waited_for_and_for_how_long():
    said, first = [], threading.Event()

    def say(line):
        said.append(line)
        first.set()

    watchdog = Watchdog(0.2, say)
    watchdog.start()
    watchdog.waits_for("the loader, before iteration 7")
    assert first.wait(30)
    watchdog.stop()
    assert said[0].startswith("stalled: waiting for the loader, before iteration 7 for 0.")
    assert float(said[0].split(" for ")[2].split()[0]) >= 0.2


def test_it_is_silent_as_long_as_things_move():
    said = []
    watchdog = Watchdog(5.0, said.append)
    watchdog.start()
    for iteration in range(20):
        watchdog.waits_for(f"iteration {iteration}")
        time.sleep(0.01)
    watchdog.stop()
    assert said == [] and not [t for t in threading.enumerate() if t.name == "watchdog"]


def test_zero_starts_no_thread():
    watchdog = Watchdog(0.0, print)
    watchdog.start()
    watchdog.waits_for("nothing")
    assert not [t for t in threading.enumerate() if t.name == "watchdog"]
    watchdog.stop()


def test_a_negative_limit_is_refused():
    with pytest.raises(ConfigError, match=r"train\.stall_seconds must be at least 0"):
        TrainConfig(stall_seconds=-1)
