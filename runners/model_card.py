"""README.md of an exported network: what it was trained on and how, what was measured, how it is used."""

import re
from pathlib import Path

from configs.pipelines import takes_text, unet_settings
from utils.hub import HUB_NAME, local_folder


def model_card(job, diffusion, usage: str) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        job: SamplingJob: where the run and its FID log are.
        diffusion: With its weights loaded.
        usage: Python that loads the folder.
    """
    config, weights = diffusion.config, diffusion.weights
    data, name = config.data, job.args.doc or Path(job.weights_name).stem
    trained = [each for each in (f"step {weights.step:,}" if weights.step else "",
                                 f"epoch {weights.epoch:,}" if weights.epoch else "") if each]
    rows = {
        "images": f"{data.height}x{data.width}, {data.channels} channel{'s' * (data.channels > 1)}",
        "network": _network(config, diffusion),
        "weights": f"{weights.kind}, {weights.fingerprint}" + (f", {', '.join(trained)}" if trained else ""),
        "prediction": _prediction(config.diffusion),
        **_training(job, config),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: {"diffusers" if config.model.arch in ("unet", "diffusers") else "pytorch"}
{_front_matter(config)}
---

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


def _front_matter(config) -> str:
    kind, tags, base = "unconditional-image-generation", "diffusion", ""
    if config.model.arch == "diffusers":
        name, folder = config.model.pretrained, local_folder(config.model.pretrained)
        kind = "text-to-image" if takes_text(unet_settings(folder)) else kind
        tags += ", lora" if config.model.lora_rank else ""
        if re.fullmatch(HUB_NAME, name) and not Path(name).is_dir():         # a folder here is no model of the hub
            base = f"\nbase_model: {name}"
    elif config.model.num_labels:
        tags += ", class-conditional"
    return f"pipeline_tag: {kind}\ntags: [{tags}]{base}"


def _training(job, config) -> dict[str, str]:
    """What is known of the training: all where the weights lie in the folder of the run that made them."""
    if job.weights is None or job.weights.parent.resolve() != job.run.path.resolve():
        return {"training": f"not known here; the weights are those of {Path(job.weights_name).name}"}
    data, training, optim = config.data, config.training, config.optim
    return {
        "data": data.dataset + (", mirrored at random" if data.random_flip else ""),
        "loss": _loss(config.loss),
        "batch": f"{training.global_batch_size or training.batch_size} images"
                 + ("" if training.global_batch_size else " on each process"),
        "optimizer": f"{optim.optimizer}, lr {optim.lr:g}, averages {', '.join(map(str, training.ema)) or 'none'}",
    }


def _prediction(diffusion) -> str:
    if diffusion.schedule != "discrete":
        return f"{diffusion.prediction}, continuous noise levels"
    betas = diffusion.beta_schedule if diffusion.betas is None else "listed"
    return f"{diffusion.prediction}, {diffusion.num_steps:,} steps, betas {betas}"


def _network(config, diffusion) -> str:
    model = config.model
    count = sum(p.numel() for p in diffusion.model.parameters())
    if model.arch != "diffusers":
        return f"{model.arch}, {count:,} parameters"
    if model.lora_rank is None:
        return f"U-Net of {model.pretrained}, {count:,} parameters"
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
