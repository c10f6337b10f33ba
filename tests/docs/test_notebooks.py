"""The notebooks of the docs run from their first cell to the last, as a reader would run them.

The site shows the output that they hold: ``DRCNN_KEEP_OUTPUT=1`` writes it anew.
"""

import os
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install 'drcnn[docs]'")
nbformat = pytest.importorskip("nbformat", reason="needs nbformat: pip install 'drcnn[docs]'")
pytest.importorskip("ipykernel", reason="needs ipykernel: pip install 'drcnn[docs]'")

NOTEBOOKS = Path(__file__).resolve().parents[2] / "docs" / "notebooks"


def run(name: str, folder: Path, monkeypatch) -> dict[str, str]:
    """Runs a notebook in ``folder``; returns the last line that each cell printed, by the cell's id."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other tests run beside this one
    file = NOTEBOOKS / f"{name}.ipynb"
    notebook = nbformat.read(file, as_version=4)
    settings = dict(notebook.metadata)
    where = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=900, record_timing=False, resources=where).execute()
    if os.environ.get("DRCNN_KEEP_OUTPUT"):
        notebook.metadata = settings
        nbformat.write(notebook, file)
    printed = {}
    for cell in notebook.cells:
        texts = [
            output.get("text", output.get("data", {}).get("text/plain", ""))
            for output in cell.get("outputs", [])
        ]
        lines = "".join(texts).strip().splitlines()
        printed[cell.id] = lines[-1] if lines else ""
    return printed


def test_train_on_own_data(tmp_path, monkeypatch):
    printed = run("own_data", tmp_path, monkeypatch)
    assert "1 error" in printed["check"]
    assert "no errors" in printed["fix"]
    assert float(printed["ap50"]) > 0.1  # before training 0


def test_what_the_thresholds_do(tmp_path, monkeypatch):
    printed = run("thresholds", tmp_path, monkeypatch)
    words = printed["train"].split()  # T 0.511, beta 0.552
    assert float(words[1].rstrip(",")) > 0.4
    assert float(words[3]) < 1.0


@pytest.mark.parametrize("name", ["own_data", "thresholds"])
def test_notebooks_hold_the_output_that_the_site_shows(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
