"""Words above a picture."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

HEIGHT, SIZE = 16, 12                                # pixels of the strip, and of the letters: 10 lose the spaces


def captioned(sheet: Tensor, text: str) -> Tensor:
    """uint8 (C, H, W) -> (C, H + HEIGHT, W): black words on a white strip on top."""
    strip = Image.new("L", (sheet.shape[2], HEIGHT), 255)
    ImageDraw.Draw(strip).text((2, 1), text, fill=0, font=ImageFont.load_default(SIZE))
    row = torch.from_numpy(np.array(strip))                                         # (HEIGHT, W)
    return torch.cat([row.expand(sheet.shape[0], -1, -1).to(sheet.device), sheet], 1)
