"""Records on Weights & Biases; with ``WANDB_MODE=offline`` in ``RUN/wandb``, for ``wandb sync`` later."""

import os
import uuid
from pathlib import Path
from typing import Any

import wandb

from drcnn.engine.loggers import scalars
from drcnn.errors import ConfigError


class WandbLogger:
    """Logs to one W&B run, which a resumed run continues: its id is kept in ``RUN/wandb/run_id``.

    Iterations done again after a kill have the values that they had; W&B drops steps that it has, but
    offline each process writes a part of its own. Set ``WANDB_PROJECT`` and W&B's other variables as usual.

    Args:
        run (Path): the run folder.
        plain_config (dict): the experiment as plain types.

    Raises:
        ConfigError: if W&B does not start, as without an account.
    """

    def __init__(self, run: Path, plain_config: dict[str, Any]) -> None:
        file = run / "wandb" / "run_id"
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            file.write_text(uuid.uuid4().hex[:12])
        project = os.environ.get("WANDB_PROJECT", "drcnn")
        settings = {"dir": str(run), "id": file.read_text(), "resume": "allow", "config": plain_config}
        try:
            self._run = wandb.init(project=project, name=run.resolve().name, **settings)
        except wandb.errors.Error as error:
            raise ConfigError(
                f"W&B does not start: {str(error).splitlines()[0]}; log in with wandb login, set "
                "WANDB_MODE=offline, or leave wandb out of --train.loggers"
            ) from None
        self._step = 0

    def write(self, record: dict[str, Any]) -> None:
        """Logs a record; one of earlier weights, as the test split's at the end, goes to the summary."""
        if record["step"] < self._step:
            self._run.summary.update(scalars(record))
            return
        self._step = record["step"]
        self._run.log(scalars(record), step=self._step)

    def close(self) -> None:
        """Ends the W&B run."""
        self._run.finish()
