"""Training times drawn where the loss is large: guided-diffusion's loss-second-moment sampler (2102.09672, sec. 3.3).

Notation: S times k, of each the last H losses; u a small uniform share.

    w_k = sqrt(mean of the H squared losses)       all equal until every k has H losses
    p_k = (1 - u) w_k / sum w + u / S              importance weight 1 / (S p_k)
"""

import torch
from torch import Tensor


class LossSecondMoment:
    """The last losses of every time, and draws by them: the interface of ``functions.timesteps.TimeSampler``. Its state
    is part of a training state: without it a resumed run would start over with uniform draws.

    Args:
        num_timesteps: S.
        history: H.
        uniform: u.
        device: Where the history lies; nothing of it waits for a GPU.
    """

    learns = True

    def __init__(self, num_timesteps: int, history: int = 10, uniform: float = 0.001, device="cpu"):
        self.uniform = uniform
        self.losses = torch.zeros(num_timesteps, history, dtype=torch.float64, device=device)     # newest last
        self.counts = torch.zeros(num_timesteps, dtype=torch.long, device=device)

    def update(self, times: Tensor, losses: Tensor) -> None:
        """Append losses in the order given; the oldest of a time fall out. Those of all ranks belong here, shard by
        shard. Losses that are not finite are left out.

        Args:
            times: long (N,).
            losses: Unweighted, (N,).
        """
        S, H = self.losses.shape
        times, losses = times.to(self.losses.device), losses.detach().to(self.losses)
        finite = losses.isfinite()
        new = torch.zeros_like(self.counts).index_add(0, times, finite.long())         # (S,)
        later = ((times[:, None] == times) & finite).triu(1).sum(1)                    # (N,)  of the same time
        column = torch.where(finite, (H - later).clamp(min=0), 0)                      # (N,)
        source = torch.arange(H, device=new.device) + new[:, None]                     # (S, H)
        kept = self.losses.gather(1, source.clamp(max=H - 1))
        spare = kept.new_zeros(S, 1)                           # takes what is too old already, or not finite
        rows = torch.cat([spare, kept], dim=1)                                         # (S, 1 + H)
        self.losses = rows.index_put((times, column), losses)[:, 1:]
        self.counts = (self.counts + new).clamp(max=H)

    def probabilities(self) -> Tensor:
        """p, float64 (S,)."""
        S, H = self.losses.shape
        weights = self.losses.square().mean(1).sqrt()
        full = (self.counts == H).all() & (weights.sum() > 0)
        share = torch.where(full, weights, torch.ones_like(weights))
        share = share / share.sum()
        return torch.where(full, (1 - self.uniform) * share + self.uniform / S, share)

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Times, long (B,), with replacement, and the importance weights of their losses, float32 (B,).

        Both are on the generator's device.
        """
        p = self.probabilities().to(generator.device if generator is not None else self.losses.device)
        several = max(2, batch_size)                                # for one alone the host would wait for a GPU
        times = torch.multinomial(p, several, replacement=True, generator=generator)[:batch_size]
        return times, (1 / (len(p) * p[times])).float()

    def state_dict(self) -> dict:
        return {"losses": self.losses, "counts": self.counts}       # an update makes new ones

    def load_state_dict(self, state: dict) -> None:
        """An empty state, of a run that drew otherwise so far, changes nothing.

        Raises:
            ValueError: The state is of another number of times or another history.
        """
        if not state:
            return
        if state["losses"].shape != self.losses.shape:
            raise ValueError(f"loss history of {tuple(state['losses'].shape)} (times, losses), "
                             f"needed {tuple(self.losses.shape)}")
        self.losses, self.counts = state["losses"].to(self.losses), state["counts"].to(self.counts)
