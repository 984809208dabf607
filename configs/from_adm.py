"""Flags of guided-diffusion, DDPM-IP and ADM-ES as a configuration of this program.

    python -m configs.from_adm "mpiexec -n 2 python scripts/image_train.py --input_pertub 0.15 ..." > my.yml

The whole published command may be given, or its flags alone. What a configuration does not hold, such as the number of
processes or of samples, becomes the command in the first lines of the result.
"""

import re
import shlex
import sys
from pathlib import Path

import yaml

from configs.networks import CHANNEL_MULT
from configs.schema import validate
from configs.sections import DiffusionSection
from utils.errors import UserError

TRUE, FALSE = {"yes", "true", "t", "y", "1"}, {"no", "false", "f", "n", "0"}


def _bool(text: str) -> bool:
    if text.lower() not in TRUE | FALSE:
        raise ValueError
    return text.lower() in TRUE


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _rates(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


# flag: (how its value is read, guided-diffusion's default); create_model_and_diffusion, then the scripts'.
FLAGS = {
    "image_size": (int, 64), "num_channels": (int, 128), "num_res_blocks": (int, 2), "num_heads": (int, 4),
    "num_heads_upsample": (int, -1), "num_head_channels": (int, -1), "attention_resolutions": (_numbers, [16, 8]),
    "channel_mult": (_numbers, []), "dropout": (float, 0.0), "class_cond": (_bool, False),
    "num_classes": (int, None), "use_checkpoint": (_bool, False), "use_scale_shift_norm": (_bool, True),
    "resblock_updown": (_bool, False), "use_fp16": (_bool, False), "use_new_attention_order": (_bool, False),
    "learn_sigma": (_bool, False), "diffusion_steps": (int, 1000), "noise_schedule": (str, "linear"),
    "timestep_respacing": (str, ""), "use_kl": (_bool, False), "predict_xstart": (_bool, False),
    "rescale_timesteps": (_bool, False), "rescale_learned_sigmas": (_bool, False),
    "data_dir": (str, None), "batch_size": (int, None),
    "schedule_sampler": (str, "uniform"), "lr": (float, 1e-4), "weight_decay": (float, 0.0),
    "lr_anneal_steps": (int, 0), "microbatch": (int, -1), "ema_rate": (_rates, [0.9999]), "log_interval": (int, 10),
    "save_interval": (int, 10000), "resume_checkpoint": (str, None), "fp16_scale_growth": (float, None),
    "input_pertub": (float, 0.0),
    "clip_denoised": (_bool, True), "num_samples": (int, 10000), "use_ddim": (_bool, False), "model_path": (str, None),
    "eps_scaler": (float, None), "classifier_path": (str, None), "classifier_scale": (float, 1.0),
}
OTHER_SPELLINGS = {"input_perturbation": "input_pertub"}
# What the classifier's own tensors tell here, or autocast does in its place.
NOT_NEEDED = re.compile(r"classifier_(use_fp16|width|depth|attention_resolutions|use_scale_shift_norm|resblock_updown|"
                        r"pool)|fp16_scale_growth")
SAMPLING = {"clip_denoised", "num_samples", "use_ddim", "model_path", "classifier_path", "classifier_scale"}
SCRIPTS = {"train": "train", "sample": "sample", "nll": "nll"}             # word in a script's name: what it does
BETAS = {"linear": "adm_linear", "cosine": "cosine"}
FRESH = ("# --resume_checkpoint went on at the step in the file's name, with the averages and moments beside it; here\n"
         "# --init_from begins at step 0 with these weights alone: lower training.max_steps by the steps that are\n"
         "# done, and optim.lr where it was annealed.\n")
TIME_SAMPLERS = {"uniform": "uniform", "loss-second-moment": "loss_second_moment"}


def convert(command: str) -> str:
    """YAML, whose first lines are comments with the command that takes its place.

    Args:
        command: A whole command of those programs, on one line or several, or its flags.

    Raises:
        UserError: An unknown flag or a value that is not possible; names the flag and what is allowed.
    """
    processes, script, given = _parse(command)
    flags = {name: default for name, (_, default) in FLAGS.items()} | given
    if re.match("classifier_train|super_res_", script):
        raise UserError(f"{script}.py has no counterpart here, which trains no classifiers and has no upsamplers; "
                        "converted are image_train, image_sample, classifier_sample and image_nll")
    kind = next((kind for word, kind in SCRIPTS.items() if word in script), None)
    kind = kind or ("sample" if not script and SAMPLING & given.keys() else "train")
    if "eps_scaler" in given and kind == "train":
        raise UserError("--eps_scaler in a training command: ADM-ES takes it as gamma of the input perturbation there, "
                        "and divides by it too; train with --input_pertub, scale when sampling")
    if kind == "nll" and flags["eps_scaler"] not in (None, 0, 1):
        raise UserError(f"--eps_scaler {flags['eps_scaler']:g} in a likelihood: diagnose.py nll measures the network "
                        "as it is; leave it out")
    trains = kind == "train"
    if "input_pertub" in given:
        flags["log_interval"] = given.get("log_interval", 100)              # DDPM-IP's own default
    if kind == "nll":
        flags["num_samples"] = given.get("num_samples", 1000)               # image_nll.py's
    diffusion = _diffusion(flags, trains)
    raw = {"data": _data(flags), "model": _model(flags, "input_pertub" in given), "diffusion": diffusion,
           "loss": _loss(flags), "training": _training(flags, processes if trains else 0, diffusion),
           "optim": _optim(flags)}
    validate(raw, "these flags")
    body = yaml.safe_dump(raw, sort_keys=False, default_flow_style=None, width=120)
    return f"# {shlex.join(COMMANDS[kind](flags, processes))}\n{FRESH if flags['resume_checkpoint'] else ''}{body}"


def _parse(command: str) -> tuple[int, str, dict]:
    """Processes, the script's name ("" where it is not given), and the flags that are given."""
    command = command.replace("\\\n", " ")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"not a command: {error}") from None
    launcher = re.search(r"\b(?:mpiexec|mpirun)\b.*?\s(?:-n|-np)\s+(\d+)", command)
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    script = "" if at is None else Path(words[at]).stem
    first = at + 1 if script else next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    tokens = [part for word in words[first:] for part in (word.split("=", 1) if word.startswith("--") else [word])]
    given = {}
    while tokens:
        name = tokens.pop(0)
        flag = OTHER_SPELLINGS.get(name[2:], name[2:])
        if not name.startswith("--") or (flag not in FLAGS and not NOT_NEEDED.fullmatch(flag)):
            raise UserError(f"{name!r} is no flag of guided-diffusion, DDPM-IP or ADM-ES; known: "
                            f"{', '.join(sorted(FLAGS))}")
        if not tokens or tokens[0].startswith("--"):
            raise UserError(f"{name} needs a value")
        value = tokens.pop(0)
        if not NOT_NEEDED.fullmatch(flag):
            given[flag] = _value(flag, value)
    return int(launcher[1]) if launcher else 1, script, given


def _value(flag: str, text: str):
    read = FLAGS[flag][0]
    try:
        return read(text)
    except ValueError:
        allowed = {_bool: "True or False", int: "a whole number", float: "a number", _numbers: "whole numbers such as "
                   "16,8", _rates: "numbers such as 0.9999"}[read]
        raise UserError(f"--{flag} {text!r} must be {allowed}") from None


def _choose(known: dict, flags: dict, flag: str) -> str:
    if flags[flag] not in known:
        raise UserError(f"--{flag} {flags[flag]!r} is unknown; known: {', '.join(known)}")
    return known[flags[flag]]


def _data(flags: dict) -> dict:
    labels = {"labels": "filenames"} if flags["class_cond"] else {}
    return {"dataset": "FOLDER", "root": flags["data_dir"], "image_size": flags["image_size"], "channels": 3,
            "random_flip": True, **labels}


def _model(flags: dict, is_ddpm_ip: bool) -> dict:
    size = flags["image_size"]
    if not flags["channel_mult"] and size not in CHANNEL_MULT:
        raise UserError(f"--image_size {size} has no default for --channel_mult; sizes that have: "
                        f"{', '.join(map(str, CHANNEL_MULT))}")
    same = ("num_channels", "num_res_blocks", "attention_resolutions", "num_heads", "num_heads_upsample",
            "num_head_channels", "use_scale_shift_norm", "resblock_updown", "use_new_attention_order", "learn_sigma",
            "dropout")
    classes = flags["num_classes"] or (10 if is_ddpm_ip else 1000)       # a constant in each of these programs
    return {"arch": "adm", "channel_mult": flags["channel_mult"] or list(CHANNEL_MULT[size]),
            **{key: flags[key] for key in same}, "num_classes": classes if flags["class_cond"] else 0}


def _diffusion(flags: dict, trains: bool) -> dict:
    respacing = flags["timestep_respacing"] if trains else ""
    return {"beta_schedule": _choose(BETAS, flags, "noise_schedule"),
            "num_diffusion_timesteps": flags["diffusion_steps"],
            "prediction": "sample" if flags["predict_xstart"] else "epsilon",
            "rescale_timesteps": flags["rescale_timesteps"], "timestep_respacing": respacing or None}


def _loss(flags: dict) -> dict:
    hybrid = "rescaled_hybrid" if flags["rescale_learned_sigmas"] else "hybrid"
    kind = "rescaled_kl" if flags["use_kl"] else hybrid if flags["learn_sigma"] else "none"
    return {"num_consecutive_steps": 0, "lamda": 0.0, "reduce": "mean", "variational": kind,
            "input_perturbation": flags["input_pertub"]}


def _training(flags: dict, processes: int, diffusion: dict) -> dict:
    """``processes`` is 0 where nothing is trained."""
    steps = {"max_steps": flags["lr_anneal_steps"]} if flags["lr_anneal_steps"] else {}      # else until it is stopped
    micro = {"micro_batch_size": flags["microbatch"]} if flags["microbatch"] > 0 else {}
    batch = processes * (flags["batch_size"] or 1) or 1
    shown = {"sample_timesteps": min(50, DiffusionSection(**diffusion).chain_length)}
    return {"global_batch_size": batch, **micro,
            "time_sampler": _choose(TIME_SAMPLERS, flags, "schedule_sampler"), **steps, "n_epochs": 1_000_000,
            "ema": flags["ema_rate"], "snapshot_unit": "steps", "snapshot_freq": flags["save_interval"],
            "log_freq": flags["log_interval"], **shown, "amp": "auto" if flags["use_fp16"] else "off",
            "activation_checkpointing": flags["use_checkpoint"]}


def _optim(flags: dict) -> dict:
    return {"optimizer": "AdamW", "lr": flags["lr"], "weight_decay": flags["weight_decay"],
            "lr_schedule": "linear" if flags["lr_anneal_steps"] else "constant"}


def _train(flags: dict, processes: int) -> list[str]:
    words = ["python", "train_ddp.py", "--config", "THIS.yml"]
    if processes > 1:
        words += ["--num_process_per_node", str(processes)]
    return words + (["--init_from", flags["resume_checkpoint"]] if flags["resume_checkpoint"] else [])


def _sample(flags: dict, processes: int) -> list[str]:
    words = ["python", "generate.py", *_what(flags, processes)]
    if flags["use_ddim"]:
        words += ["--sample_type", "generalized", *(["--clip_denoised"] if flags["clip_denoised"] else [])]
    else:
        words += ["--sample_type", "ddpm_noisy", "--var_type", "learned" if flags["learn_sigma"] else "fixedlarge"]
        words += [] if flags["clip_denoised"] else ["--no-clip_denoised"]
    words += ["--num_samples", str(flags["num_samples"]), "--save", "npz", "--no-fid"]
    words += ["--eps_scaler", f"{flags['eps_scaler']:.10g}"] if flags["eps_scaler"] else []
    if flags["classifier_path"]:
        words += ["--classifier", flags["classifier_path"], "--classifier_scale", f"{flags['classifier_scale']:.10g}"]
    return words + (["--amp", "auto"] if flags["use_fp16"] else [])


def _nll(flags: dict, processes: int) -> list[str]:
    words = ["python", "diagnose.py", "nll", *_what(flags, processes), "--num_images", str(flags["num_samples"])]
    return [*words, "--npz"] + ([] if flags["clip_denoised"] else ["--no-clip_denoised"])


def _what(flags: dict, processes: int) -> list[str]:
    """Network, steps, batch and processes of generate.py and diagnose.py."""
    words = ["--config", "THIS.yml", "--weights", flags["model_path"] or "FILE.pt", "--timesteps",
             flags["timestep_respacing"] or str(flags["diffusion_steps"]), "--skip_type", "respace", "--batch_size",
             str(flags["batch_size"] or 16)]
    return words + (["--num_process_per_node", str(processes)] if processes > 1 else [])


COMMANDS = {"train": _train, "sample": _sample, "nll": _nll}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        print(convert(argv[0] if len(argv) == 1 else shlex.join(argv)), end="")
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
