"""Five lines in words about a run: was it trained long enough, and does its chain drift?"""

import statistics
from math import inf, sqrt
from statistics import NormalDist

from models.ema import decay_of, first_share
from runners.diagnosis.summary import first_calls, largest

FEW_STEPS = 50_000                   # published networks take 100,000 steps and more, small data sets somewhat fewer
COLD = 0.01                          # share of the first weights in an average
TAIL = 10                            # lines that are compared, at least


def verdict(config, lines: list[dict], step: int | None, ema: bool, norms: list[dict]) -> list[str]:
    """The five lines.

    Args:
        config: Config of the run.
        lines: Of its metrics.jsonl.
        step: At which the weights were saved; None: unknown.
        ema: Whether the averaged weights are measured.
        norms: Rows of ``eps-norm``.
    """
    lines = [line for line in lines if step is None or line["step"] <= step]
    regular = [line for line in lines if 0 < (line.get("loss_base") or 0) < inf]
    held_out = [line for line in lines if line.get("validation_loss") is not None]
    step = step or (regular[-1]["step"] if regular else None)
    return [_length(step), _average(config, step, ema), _falling(regular), _held_out(regular, held_out),
            _drift(norms)]


def _length(step: int | None) -> str:
    if step is None:
        return "Steps: unknown, the weights do not say."
    if step < FEW_STEPS:
        return (f"Steps: {step:,}, which is few: what such a network gets wrong is mostly unfinished training "
                f"(published ones take 100,000 and more). Train longer before comparing remedies.")
    return f"Steps: {step:,}, of the order of published runs."


def _average(config, step: int | None, ema: bool) -> str:
    if not ema or not config.training.ema:
        return "Average: raw weights are measured; averaged ones are usually better."
    if step is None:
        return "Average: unknown, the weights do not say after how many steps they were saved."
    average = config.training.ema[0]
    decay = decay_of(average, config.training.global_batch_size or config.training.batch_size)
    share = first_share(decay, step, COLD)
    if share > COLD:
        return (f"Average: still cold, {share:.0%} of it are the first, random weights ({average}, {step:,} steps). "
                "Train longer, lower the rate, set warmup, or measure with --no-model_ema.")
    return f"Average: warm ({average}, {step:,} steps)."


def _falling(regular: list[dict]) -> str:
    losses = [line["loss_base"] for line in regular]
    count = max(TAIL, len(losses) // 5)
    if len(losses) < 2 * count:
        return f"Loss: {len(losses)} lines in metrics.jsonl, too few to tell whether it still falls."
    before, after = losses[-2 * count:-count], losses[-count:]
    change = statistics.mean(after) / statistics.mean(before) - 1
    error = sqrt((statistics.variance(before) + statistics.variance(after)) / count) / statistics.mean(before)
    span = (f"the last {count} lines of metrics.jsonl against the {count} before: {change:+.1%}, standard error "
            f"{error:.1%}")
    if change < -2 * error and change < -0.005:
        return f"Loss: still falling ({span}). More training will help."
    if change > 2 * error and change > 0.005:
        return f"Loss: rising ({span}). Lower optim.lr or take an earlier checkpoint."
    return f"Loss: flat ({span})."


def _held_out(regular: list[dict], held_out: list[dict]) -> str:
    if not held_out:
        return "Held-out loss: not measured; set training.validation_freq."
    last, lowest = held_out[-1], min(held_out, key=lambda line: line["validation_loss"])
    tail = [line["loss_base"] for line in regular[-TAIL:]]
    if not tail:
        return f"Held-out loss: {last['validation_loss']:.4g}, no training loss to compare it with."
    training = statistics.mean(tail)
    ratio = last["validation_loss"] / training
    text = f"{last['validation_loss']:.4g} against {training:.4g} in training"
    risen = last["validation_loss"] / lowest["validation_loss"] - 1
    if ratio > 1.05 and risen > 0.02:
        return (f"Held-out loss: above the training loss ({text}) and {risen:.0%} above its lowest, at step "
                f"{lowest['step']:,}: the network memorises. Take the checkpoint of then, or add dropout, flips, data.")
    if ratio > 1.05:
        return f"Held-out loss: above the training loss ({text}), but not rising."
    return f"Held-out loss: no higher than the training loss ({text})."


def _drift(norms: list[dict]) -> str:
    # The last steps of a list are bent most by their finite length, also for a perfect network: look above them.
    norms = first_calls(norms)
    rows = norms[max(1, len(norms) // 10):] if len(norms) > 4 else norms
    chance = NormalDist().inv_cdf(1 - 0.025 / len(rows))     # standard errors that the worst of so many rows may be off
    worst = largest(rows, "ratio", "ratio_error", 1.0, chance)
    drift = worst["ratio"] - 1
    where = f"eps-norm {drift:+.1%} at t = {worst['t']:.4g}, standard error {worst['ratio_error']:.1%}"
    if abs(drift) <= max(chance * worst["ratio_error"], 0.002):
        return f"Drift: none that can be told from chance ({where})."
    if abs(drift) > 0.1:
        return (f"Drift: large ({where}), more than exposure bias does: unfinished training or too few sampling steps. "
                "Mend those first; --eta 1 and more --timesteps forgive most.")
    more, side = ("more", "below") if drift > 0 else ("less", "above")
    return (f"Drift: the network finds {more} noise in its chain than in training ({where}). The length of 50 to 100 "
            "steps makes 1% to 2% of it in a perfect network, too: see first what more --timesteps leave. Then try "
            f"diagnose.py fit-eps-scaler, or --dcw {side} 0, one of them; --eta 1, --restart or --time_shift; in "
            "training the sequence-aware loss or input perturbation.")
