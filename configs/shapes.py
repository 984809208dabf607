"""Settings of published U-Nets, for rehearsals where the models themselves are not at hand."""

_SD = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "center_input_sample": False, "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "norm_eps": 1e-5,
    "norm_num_groups": 32, "out_channels": 4,
}
_SD15 = {
    **_SD, "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768,
    "sample_size": 64, "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
_SDXL = {
    **_SD, "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128, "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True,
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
}
# Name on the hub -> unet/config.json. Their autoencoders make 4 channels of 8 x 8 pixels; prompts have 77 tokens.
SHAPES = {"stabilityai/stable-diffusion-xl-base-1.0": _SDXL, "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD15}
FACTOR, TOKENS = 8, 77
