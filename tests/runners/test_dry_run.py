"""What a dry run predicts."""

import torch

from configs.schema import Config
from runners.diffusion import Diffusion
from runners.training.dry_run import training_memory
from runners.training.plan import Plan
from tests.faults import jobs


def test_activation_checkpointing_is_seen():
    further = []
    for checkpointing in (False, True):
        config = Config.model_validate({
            "data": {"dataset": "DIGITS", "image_size": 32},
            "model": {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 2, "attn_resolutions": []},
            "training": {"activation_checkpointing": checkpointing}})
        diffusion, plan = Diffusion(config, "cpu"), Plan.make(config.training, 1000, 1)
        further.append(training_memory(diffusion, torch.zeros(2, *config.data.shape, dtype=torch.uint8), plan)[2])
    assert 0 < further[1] < 0.8 * further[0]


def test_two_ranks_say_once_what_is_wrong(tmp_path):
    argv = ["--config", "cifar10_tiny.yml", "--device", "cpu", "--exp", str(tmp_path), "--dry_run"]
    ranks = jobs.ranks("train_ddp", argv)
    assert [rank.wait() for rank in ranks] == [2, 2]
    assert sum(rank.text.count("ZIP needs data.root") for rank in ranks) == 1
