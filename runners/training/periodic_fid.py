"""FID of the averaged weights while training."""

from configs.schema import Config
from functions.pixels import to_uint8
from models.inception import load_inception
from runners import distributed
from runners.evaluation.metrics import Evaluation, find_reference
from runners.training.plan import deal


class PeriodicFid:
    """Holds the reference and the feature network, so that both are there before training starts.

    Raises:
        UserError: No reference, or no weights of the feature network.
    """

    def __init__(self, config: Config, device):
        self.reference, self.net = find_reference(config), load_inception(device=device)

    def measure(self, diffusion) -> dict:
        """Results of ``training.fid_num`` images from the seeds 0, 1, ..., shared among the ranks. Collective."""
        training, size = diffusion.config.training, diffusion.config.sampling.batch_size
        evaluation = Evaluation(self.reference, self.net)
        for start, seeds in deal(list(range(training.fid_num)), size, distributed.rank(), distributed.world_size()):
            batch, = diffusion.sample(seeds, timesteps=training.sample_timesteps)
            evaluation.update(to_uint8(batch.images), list(range(start, start + len(seeds))))
        return evaluation.results()
