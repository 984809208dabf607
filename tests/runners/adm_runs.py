"""A run of ADM that takes milliseconds a step, and its command lines."""

# Trains in milliseconds; so few steps that every one soon has its ten losses.
SMALL = {
    "data": {"dataset": "DIGITS", "image_size": 8, "channels": 1, "random_flip": False, "num_workers": 0},
    "model": {"arch": "adm", "in_channels": 1, "num_channels": 32, "channel_mult": [1], "num_res_blocks": 1,
              "attention_resolutions": [8], "num_head_channels": 16, "learn_sigma": True, "num_classes": 10,
              "dropout": 0.1},
    "diffusion": {"beta_schedule": "cosine", "num_diffusion_timesteps": 8},
    "loss": {"num_consecutive_steps": 2, "lamda": 1.0, "input_perturbation": 0.15, "reduce": "mean",
             "variational": "rescaled_hybrid"},
    "training": {"global_batch_size": 32, "time_sampler": "loss_second_moment", "label_dropout": 0.1, "sample_num": 0,
                 "sample_timesteps": 4, "log_freq": 1, "ema": 0.9},
    "optim": {"optimizer": "AdamW", "lr": 1e-3},
}


def flags(config_file, exp, *more):
    return ["--config", config_file, "--exp", str(exp), "--device", "cpu", "--verbose", "critical", *map(str, more)]
