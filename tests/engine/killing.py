"""Runs `drcnn train` in children of one process that has torch loaded, and kills them at given moments.

    python killing.py PLAN

PLAN is a json file: the `arguments` of the verb, two folders for the runs `unbroken` and `killed`, and the
`moments` at which the second is killed by SIGKILL, to be resumed in another child. A moment comes when the
child has told of a `step`, or a later one; then, if they are given, has `said` a text, or is `writing` a
checkpoint, or has gone on for as many iterations as it is to `wait`, at most to its next line. In the end
both runs are complete. Printed is, as json, what stood in the folder of checkpoints right after each kill.
"""

import json
import os
import re
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch

from drcnn.train import main

LONGEST = 600  # seconds to wait for a moment


class Child:
    """A process that begins a run, or resumes it; its lines go to a file."""

    def __init__(self, arguments: list[str], run: Path) -> None:
        self.output = run.with_suffix(".out")
        self.output.unlink(missing_ok=True)
        resume = ["--resume"] if (run / "checkpoints" / "last.pt").exists() else []
        self.number = os.fork()
        if self.number == 0:
            self.train([*arguments, "--out", str(run), *resume])

    def train(self, arguments: list[str]) -> None:
        """What the child does."""
        code = 70
        try:
            os.setsid()
            file = os.open(self.output, os.O_CREAT | os.O_WRONLY)
            os.dup2(file, 1)
            os.dup2(file, 2)
            code = main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def step(self) -> int:
        """The last iteration that the child has told of."""
        told = re.findall(r"^(?:step|resumed after iteration) (\d+)", self.text(), re.MULTILINE)
        return int(told[-1]) if told else 0

    def text(self) -> str:
        """What it has said."""
        return self.output.read_text() if self.output.exists() else ""

    def wait_until(self, condition, moment: dict, pause: float = 0.002) -> None:
        """Returns as soon as the condition holds."""
        end = time.monotonic() + LONGEST
        while not condition():
            assert os.waitpid(self.number, os.WNOHANG) == (0, 0), f"ended before {moment}: {self.text()}"
            assert time.monotonic() < end, f"{moment} did not come: {self.text()}"
            time.sleep(pause)

    def kill_at(self, moment: dict, checkpoints: Path, pace: float) -> list[str]:
        """Kills it at a moment; gives the names in the folder of checkpoints."""
        self.wait_until(lambda: self.step() >= moment["step"], moment)
        reached, end = self.step(), time.monotonic() + moment.get("wait", 0) * pace
        if "said" in moment:
            self.wait_until(lambda: moment["said"] in self.text(), moment)
        elif "writing" in moment:
            self.wait_until((checkpoints / f".{moment['writing']}.tmp").exists, moment, pause=0)
        else:
            self.wait_until(lambda: time.monotonic() >= end or self.step() > reached, moment)
        os.kill(self.number, signal.SIGKILL)
        _, status = os.waitpid(self.number, 0)
        assert os.WIFSIGNALED(status), f"ended before {moment}: {self.text()}"
        return [path.name for path in checkpoints.glob("*")]

    def sweep(self) -> None:
        """Ends what it has left: torch's workers do not notice a parent that dies while they start."""
        with suppress(ProcessLookupError):
            os.killpg(self.number, signal.SIGKILL)

    def finish(self) -> None:
        """Waits for its end."""
        _, status = os.waitpid(self.number, 0)
        assert os.waitstatus_to_exitcode(status) == 0, self.text()


def carry_out(plan: dict) -> list[list[str]]:
    """Trains both runs."""
    unbroken, killed = Path(plan["unbroken"]), Path(plan["killed"])
    Child(plan["arguments"], unbroken).finish()
    records = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    times = [record["time_per_step"] for record in records if "split" not in record]
    pace, found = sum(times) / len(times), []
    children = []
    for moment in plan["moments"]:
        children.append(Child(plan["arguments"], killed))
        found.append(children[-1].kill_at(moment, killed / "checkpoints", pace))
    Child(plan["arguments"], killed).finish()
    for child in children:
        child.sweep()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(carry_out(json.loads(Path(sys.argv[1]).read_text()))))
