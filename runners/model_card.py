"""README.md of an exported network: what it was trained on and how, what was measured, how it is used."""

from pathlib import Path


def model_card(job, diffusion, usage: str) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        job: SamplingJob: where the run and its FID log are.
        diffusion: With its weights loaded.
        usage: Python that loads the folder.
    """
    config, weights = diffusion.config, diffusion.weights
    loss, data, model = config.loss, config.data, config.model
    name = job.args.doc or Path(job.weights_name).stem
    trained = [each for each in (f"step {weights.step:,}" if weights.step else "",
                                 f"epoch {weights.epoch:,}" if weights.epoch else "") if each]
    rows = {
        "data": f"{data.dataset}, {data.height}x{data.width}, {data.channels} channel(s)"
                + (", mirrored at random" if data.random_flip else ""),
        "network": _network(config, diffusion),
        "weights": f"{weights.kind}, {weights.fingerprint}" + (f", {', '.join(trained)}" if trained else ""),
        "prediction": _prediction(config.diffusion),
    }
    if job.args.config or job.run.config.exists():           # else the file of weights says only what the network is
        rows |= {
            "loss": _loss(loss),
            "batch": f"{config.training.global_batch_size or config.training.batch_size} images"
                     + ("" if config.training.global_batch_size else " on each process"),
            "optimizer": f"{config.optim.optimizer}, lr {config.optim.lr:g}, averages "
                         + (", ".join(map(str, config.training.ema)) or "none"),
        }
    library = "diffusers" if model.arch in ("unet", "diffusers") else "pytorch"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    base = f"base_model: {model.pretrained}\n" if getattr(model, "pretrained", None) else ""
    return f"""---
library_name: {library}
tags: [{_tags(config)}]
{base}---

# {name}

| | |
|---|---|
{table}

## Use

```python
{usage}
```

## Measured

{_measured(job)}
"""


def _prediction(diffusion) -> str:
    if diffusion.schedule != "discrete":
        return f"{diffusion.prediction}, continuous noise levels"
    betas = diffusion.beta_schedule if diffusion.betas is None else "listed"
    return f"{diffusion.prediction}, {diffusion.num_steps:,} steps, betas {betas}"


def _tags(config) -> str:
    kind = ("text-to-image" if config.model.arch == "diffusers" else
            "class-conditional-image-generation" if config.model.num_labels else "unconditional-image-generation")
    return f"diffusion, {kind}" + (", lora" if getattr(config.model, "lora_rank", None) else "")


def _network(config, diffusion) -> str:
    model = config.model
    count = sum(p.numel() for p in diffusion.model.parameters())
    if model.arch != "diffusers":
        return f"{model.arch}, {count:,} parameters"
    if model.lora_rank is None:
        return f"U-Net of {model.pretrained}, {count:,} parameters, all trained"
    return f"U-Net of {model.pretrained}, LoRA of rank {model.lora_rank} in {', '.join(model.lora_targets)}"


def _loss(loss) -> str:
    if loss.lamda and loss.num_consecutive_steps > 1:
        base = f"sequence-aware, K = {loss.num_consecutive_steps}, lamda = {loss.lamda:g}"
    else:
        base = "plain (DDPM's L_simple)"
    perturbed = f", input perturbation gamma = {loss.input_perturbation:g}" if loss.input_perturbation else ""
    bound = "" if loss.variational == "none" else f", variational bound ({loss.variational})"
    return base + perturbed + bound + ("" if loss.weight == "none" else f", weight {loss.weight}")


def _measured(job) -> str:
    """The FID lines of this run's checkpoints, from the log."""
    folder = f"Checkpoint {job.run.path.name}/"
    try:
        lines = [line for line in job.fid_log.read_text().splitlines() if line.startswith(folder)]
    except (OSError, UnicodeDecodeError):
        lines = []
    return "```\n" + "\n".join(lines) + "\n```" if lines else "No FID of this run is logged."
