"""Running a detector over a data set: the same numbers whatever the batch size and the number of ranks."""

import json
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from drcnn.data import eval_loader, load_split
from drcnn.engine.evaluator import evaluate
from drcnn.errors import DataError
from drcnn.structures import Detections


class Knows(nn.Module):
    """A detector that has seen the answers: it recognises an image by the sum of its pixels."""

    def __init__(self, dataset, data_config):
        super().__init__()
        self.answers = {}
        for batch in eval_loader(dataset, data_config, batch_size=1):
            self.answers[int(batch.images.tensor.long().sum())] = batch.targets

    def forward(self, images):
        found = [self.answers[int(image.long().sum())] for image in images.tensor]
        most = max(t.boxes.shape[1] for t in found)
        boxes, labels = torch.zeros(len(found), most, 4), torch.zeros(len(found), most, dtype=torch.int64)
        valid = torch.zeros(len(found), most, dtype=torch.bool)
        for i, target in enumerate(found):
            count = target.boxes.shape[1]
            boxes[i, :count], labels[i, :count], valid[i, :count] = (x[0] for x in target[:3])
        return Detections(boxes, torch.where(valid, 0.9, 0.0), labels, valid)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_detector_that_knows_the_answers_scores_one(tiny_data, batch_size):
    dataset = load_split(tiny_data, "val")
    model = Knows(dataset, tiny_data).train()
    seen = []
    metrics, results = evaluate(
        model,
        dataset,
        tiny_data,
        device="cpu",
        batch_size=batch_size,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert metrics.summary["AP"] == pytest.approx(1.0)
    assert metrics.num_images == len(dataset)
    assert metrics.num_detections == len(results) == sum(len(dataset.boxes(i)) for i in range(len(dataset)))
    assert model.training
    assert seen[-1] == (len(dataset), len(dataset)) and len(seen) == -(-len(dataset) // batch_size)


def test_a_split_without_annotations_cannot_be_evaluated(tiny_data, tiny_coco, tmp_path):
    content = json.loads((tiny_coco / "annotations/instances_val.json").read_text())
    del content["annotations"]
    (tmp_path / "val.json").write_text(json.dumps(content))
    from dataclasses import replace

    config = replace(
        tiny_data,
        val=replace(
            tiny_data.val, images=str(tiny_coco / "images/val"), annotations=str(tmp_path / "val.json")
        ),
    )
    with pytest.raises(DataError, match="no annotations"):
        evaluate(nn.Identity(), load_split(config, "val"), config, device="cpu")


def _rank(rank, world_size, port, tiny_data, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    dataset = load_split(tiny_data, "val")
    model = Knows(dataset, tiny_data)
    metrics, results = evaluate(model, dataset, tiny_data, device="cpu", batch_size=1)
    (folder / f"{rank}.json").write_text(json.dumps([metrics.to_dict(), results]))
    dist.destroy_process_group()


def test_ranks_share_the_images_and_agree(tiny_data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_rank, (2, port, tiny_data, tmp_path), nprocs=2, start_method="fork")
    dataset = load_split(tiny_data, "val")
    metrics, results = evaluate(Knows(dataset, tiny_data), dataset, tiny_data, device="cpu")
    expected = json.loads(json.dumps([metrics.to_dict(), results]))
    assert json.loads((tmp_path / "0.json").read_text()) == expected
    assert json.loads((tmp_path / "1.json").read_text()) == [expected[0], []], (
        "only the main rank holds results"
    )
