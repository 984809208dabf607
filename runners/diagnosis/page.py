"""The page of ``diagnose.py all``: the verdict, and every plot with what it shows, in one HTML file."""

from pathlib import Path
from tempfile import TemporaryDirectory

from runners.diagnosis.curves import write_panel
from runners.diagnosis.panels import PANELS
from runners.diagnosis.summary import SUMMARIES
from runners.study.page import Gallery, Heading, Text, to_html
from utils.atomic import write_text

# What a plot shows, and how to read it.
CAPTIONS = {
    "eps-norm": ("Norm of the predicted noise", "On noised real images (training) and along the chain (sampling). A "
                 "ratio that leaves 1 is drift; steps of finite length bend it, too."),
    "exposure": ("Variance of the chain", "Variance of what the network gets along the chain minus that of noised "
                 "images, averaged over pixels, and its root with sign."),
    "gap": ("Gap to the true noise", "Mean of predicted minus true noise along chains that start from noised images; "
            "the dotted line is what chance alone gives. Second: what accumulates."),
    "spectrum": ("Frequencies", "Energy in the bands of a Haar transform (ll: low; lh, hl, hh: high), chain against "
                 "training, of the network's input and of its estimate; the power spectrum of the final images."),
    "snr": ("Effective time", "The time at which training would make the network predict noise of the size that it "
            "predicts along the chain. Above 0: the chain's inputs look noisier than the network is told. Times at "
            "which the size hardly depends on the noise are left out."),
    "gamma": ("Gamma", "Mean square of the predicted noise for each pixel: 1 where there is nothing but noise."),
    "energy": ("Energy of the estimate", "Mean square of the estimated image for each pixel, which rises to that of "
               "the data. A chain that stays below it fades."),
}


def write_page(path: Path, title: str, found: dict[str, dict], verdicts: dict[str, list[str]], log_time: bool) -> None:
    """Verdicts first.

    Args:
        found: Measure -> name of the run -> rows.
        verdicts: Name of the run -> sentences of the form "Subject: what there is to say".
    """
    blocks = [Text(title)]
    for name, sentences in verdicts.items():
        blocks += [Heading(f"Verdict: {name}"), *(Text(sentence) for sentence in sentences)]
    with TemporaryDirectory() as folder:
        for measure, runs in found.items():
            heading, caption = CAPTIONS[measure]
            pictures = []
            for number, panel in enumerate(PANELS[measure](runs)):
                picture = Path(folder) / f"{measure}-{number}.png"
                write_panel(panel, picture, log_time)
                pictures.append((f"{measure}, {number + 1}", picture))
            figures = [Text(f"{name}: {SUMMARIES[measure](rows)}.") for name, rows in runs.items()]
            blocks += [Heading(heading), Gallery(caption, pictures), *figures]
        write_text(path, to_html("Exposure bias along the chain", blocks, STYLE))


# Plots beside one another where there is room for two, else below.
STYLE = """
.gallery { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.gallery img { image-rendering: auto; } .gallery figcaption { display: none; }
p { overflow-wrap: break-word; }
"""
