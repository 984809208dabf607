"""FID of the averaged weights while training."""

from configs.sampling import SamplerSettings
from configs.schema import Config
from models.inception import load_inception
from runners.evaluation.metrics import Evaluation, find_reference
from runners.sampling.generation import generate_and_measure


class PeriodicFid:
    """Holds the reference and the feature network, so that both are there before training starts.

    Raises:
        UserError: No reference, or no weights of the feature network.
    """

    def __init__(self, config: Config, device):
        self.reference, self.net = find_reference(config), load_inception(device=device)

    def measure(self, diffusion) -> dict:
        """Results of ``training.fid_num`` images from the seeds 0, 1, ..., shared among the ranks. Collective."""
        training = diffusion.config.training
        sampler = diffusion.sampler(SamplerSettings(timesteps=training.sample_timesteps))
        return generate_and_measure(sampler, range(training.fid_num), diffusion.config.sampling.batch_size,
                                    evaluation=Evaluation(self.reference, self.net)).results
