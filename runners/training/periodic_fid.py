"""FID of the averaged weights while training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from configs.sampling import SamplerSettings
from configs.schema import Config
from models.inception import load_inception
from runners import distributed
from runners.evaluation.metrics import Evaluation, find_reference
from runners.sampling.generation import generate_and_measure
from utils.errors import DivergedError


class PeriodicFid:
    """Holds the reference and the feature network, so that both are there before training starts.

    Raises:
        UserError: No reference, or no weights of the feature network.
    """

    def __init__(self, config: Config, device):
        self.reference, self.net = find_reference(config), load_inception(device=device)

    def measure(self, diffusion) -> dict:
        """Results of ``training.fid_num`` images from the seeds 0, 1, ..., shared among the ranks. Collective.

        Raises:
            DivergedError: An image of any rank is not finite; on all ranks alike.
        """
        config, flaws = diffusion.config, []
        sampler = diffusion.sampler(SamplerSettings(timesteps=config.training.sample_timesteps))

        def images(seeds: Sequence[int]) -> Tensor:
            try:
                return sampler(seeds)
            except DivergedError as error:                   # the other ranks count on this one's images
                flaws.append(str(error))
                return torch.zeros(len(seeds), config.data.channels, config.data.image_size, config.data.image_size)

        made = generate_and_measure(images, range(config.training.fid_num), config.sampling.batch_size,
                                    evaluation=Evaluation(self.reference, self.net))
        flaws = [flaw for each in distributed.gather_objects(flaws) for flaw in each]
        if flaws:
            raise DivergedError(flaws[0])
        return made.results
