"""Generate images from seeds, compute their FID and log it, on any number of processes."""

import argparse
import sys
import time
from contextlib import ExitStack

from runners.cli import Parser, add_common, natural, positive, run_script


def parse(argv):
    parser = Parser(prog="generate.py", description=__doc__)
    add_common(parser)
    on_off = argparse.BooleanOptionalAction
    weights = parser.add_argument_group("weights")
    weights.add_argument("--ckpt_id", type=int, help="epoch (default: sampling.ckpt_id, else the newest)")
    weights.add_argument("--model_ema", action=on_off, default=True, help="averaged rather than raw weights")
    weights.add_argument("--weights", metavar="FILE", help="load this file or folder instead of a run's checkpoint")
    images = parser.add_argument_group("images")
    images.add_argument("-i", "--image_folder", help="relative: under exp/image_samples/; absolute: as given "
                                                     "(default: DOC)")
    images.add_argument("--num_samples", type=positive, help="how many (default: 50000, or as --seeds says)")
    images.add_argument("--seeds", metavar="LIST", help='such as "0-63" or "1,2,5-10" (default: 0 to num_samples - 1)')
    images.add_argument("--save", choices=["png", "npz", "none"], default="png",
                        help="none: images only pass through the metrics")
    images.add_argument("--subdirs", action="store_true", help="sub-folders of 1,000 images")
    images.add_argument("--grid", type=natural, default=64, metavar="N",
                        help="picture of the first N images, beside the folder; 0: none")
    images.add_argument("--interpolation", action="store_true", help="instead: a picture of paths between 8 seeds")
    images.add_argument("--sequence", action="store_true", help="instead: a picture of the chains of 8 seeds")
    images.add_argument("--reconstruct", metavar="PATH", help="instead: encode the first images of this folder, zip or "
                        "npz by DDIM's reversed chain, decode them, write pairs and errors (--seeds: which images)")
    sampler = parser.add_argument_group("sampler")
    sampler.add_argument("--timesteps", default="1000", metavar="S", help="number of steps, ddimN, or 10,15,20")
    sampler.add_argument("--eta", type=float, default=0.0, help="0 (deterministic) to 1, for generalized")
    sampler.add_argument("--sample_type", default="generalized", help="generalized (DDIM), ddpm_noisy "
                         "(ancestral), heun or euler (EDM), dpmpp_2m (DPM-Solver++)")
    sampler.add_argument("--skip_type", default="uniform",
                         help="uniform, quad, leading, linspace, trailing, respace or edm")
    sampler.add_argument("--var_type", choices=["fixedlarge", "fixedsmall"], default="fixedlarge",
                         help="variance of ddpm_noisy")
    sampler.add_argument("--eps_scaler", metavar="B or K,B", help="divide the predicted noise by B, or by K i + B")
    sampler.add_argument("--churn", metavar="S[,MIN,MAX,NOISE]", help="EDM's S_churn, S_min, S_max and S_noise, for "
                                                                      "heun and euler")
    sampler.add_argument("--clip_denoised", action=on_off, help="clamp estimates of x0 (default: only for ddpm_noisy)")
    sampler.add_argument("--batch_size", type=number_or_auto, metavar="N", help="images at a time, which does not "
                         "change them; auto: what fills the device (default: sampling.batch_size)")
    sampler.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="off")
    sampler.add_argument("--compile", choices=["auto", "on", "off"], default="auto")
    fid = parser.add_argument_group("FID")
    fid.add_argument("--fid", action=on_off, default=True, help="compute it, or whatever --metrics names")
    fid.add_argument("--fid_log", metavar="FILE", help="log to append to, a .jsonl beside it (default: EXP/fid.txt)")
    fid.add_argument("--fid_stats", metavar="FILE", help="reference statistics (default: sampling.fid_stats); "
                                                         "auto: make them from the data set if they are missing")
    fid.add_argument("--inception_weights", metavar="FILE", help="weights of the feature network")
    fid.add_argument("--metrics", default="fid", help="comma list of fid, kid, is, pr")
    fid.add_argument("--bootstrap", type=natural, default=0, metavar="N", help="95%% interval of FID, N resamples")
    fid.add_argument("--force", action="store_true", help="compare with a reference that was made for something else")
    fid.add_argument("--preprocess", choices=["pytorch-fid", "tf1"], default="pytorch-fid")
    parser.add_argument("--dry_run", action="store_true", help="check everything, call the network once; write nothing")
    return parser.parse(argv)


def number_or_auto(text: str) -> int | str:
    return text if text == "auto" else positive(text)


number_or_auto.__name__ = "whole number or auto"                                  # argparse puts it into its message


def check(args):
    from runners.evaluation.metrics import METRICS
    from runners.sampling.job import SamplingJob
    from utils.errors import choose

    job = SamplingJob(args)
    for metric in job.metrics:
        choose(METRICS, metric, "--metrics")
    job.reference()


def work(args, device):
    import torch

    from runners.diffusion import Diffusion
    from runners.distributed import on_rank_zero, world_size
    from runners.network import explain_out_of_memory, fill_device, resolve_amp, resolve_compile
    from runners.sampling.job import SamplingJob
    from runners.training.dry_run import dry_run_sampling
    from utils.locks import lock_folder

    job = SamplingJob(args)
    for note in job.notes:
        on_rank_zero(lambda note=note: print(note))
    amp = resolve_amp(args.amp, device)
    if args.dry_run:
        job.reference()
        return dry_run_sampling(job, device)
    diffusion = Diffusion(job.config, device)
    diffusion.load(on_rank_zero(lambda: job.weights), args.model_ema)          # "newest" may change between ranks
    diffusion.amp = amp
    if amp is None:
        torch.backends.cudnn.allow_tf32 = False                               # "off" means float32
    if job.batch_size == "auto":                                              # the same on all ranks
        network, share = diffusion.network(), -(-len(job.seeds) // world_size())
        job.batch_size = on_rank_zero(lambda: fill_device(network, job.config.data.shape, share))
    batches = len(job.seeds) // (job.batch_size * world_size())
    diffusion.compiled = resolve_compile(args.compile, device, job.calls * batches)
    with ExitStack() as held:
        on_rank_zero(lambda: held.enter_context(lock_folder(job.folder.path)))
        if job.pictures:
            return on_rank_zero(lambda: draw_pictures(job, diffusion))
        with explain_out_of_memory():
            produce(job, diffusion)


def draw_pictures(job, diffusion):
    from runners.sampling.pictures import interpolation_grid, reconstruct, sequence_grid
    from runners.training.monitor import save_png

    for wanted, name, draw in ((job.args.interpolation, "interpolation", interpolation_grid),
                               (job.args.sequence, "sequence", sequence_grid)):
        if wanted:
            path = job.folder.path.with_name(f"{job.folder.path.name}_{name}.png")
            save_png(draw(diffusion, job.seeds, job.settings), path)
            print(path)
    if job.args.reconstruct:
        reconstruct(diffusion, job.args.reconstruct, job.seeds, job.settings, job.batch_size, job.folder.path)


def produce(job, diffusion):
    """Make the images, feed the metrics, write the grid and the log."""
    from runners.distributed import on_rank_zero
    from runners.sampling import generation

    args, started = job.args, time.perf_counter()
    evaluation = open_evaluation(job, diffusion.device)
    if args.save != "none":
        manifest = generation.manifest_of(diffusion, job.settings)
        if args.save == "npz":                       # rows have no names: which seed is where is part of the request
            manifest["seeds"] = job.seed_text
        on_rank_zero(lambda: job.folder.prepare(manifest))
    writer = {"png": lambda: generation.PngWriter(job.folder, job.config.data.shape),
              "npz": lambda: generation.NpzWriter(job.folder.path, len(job.seeds), job.config.data.shape),
              "none": generation.NoWriter}[args.save]()
    shown = {}
    for start, seeds, images in generation.generate(diffusion, job.seeds, job.settings, job.batch_size, writer):
        if evaluation:
            evaluation.update(images, list(range(start, start + len(seeds))))
        shown.update((start + i, images[i].clone()) for i in range(len(seeds)) if start + i < args.grid)
    if args.grid:
        path = job.folder.path.with_name(f"{job.folder.path.name}_grid.png")
        generation.write_grid(shown, path)
        on_rank_zero(lambda: print(f"grid    {path}"))
    if args.save != "none":
        on_rank_zero(lambda: print(f"images  {job.folder.path}"))
    if evaluation:
        results = evaluation.results()
        on_rank_zero(lambda: report(job, diffusion, results, time.perf_counter() - started))


def open_evaluation(job, device):
    """The metrics, with their reference, or None; ``--fid_stats auto`` makes a reference that is missing."""
    from models.inception import load_inception
    from runners.distributed import on_rank_zero
    from runners.evaluation.metrics import Evaluation, make_reference

    args = job.args
    if not args.fid:
        return None
    missing = on_rank_zero(lambda: job.reference() is None)
    net = load_inception(args.inception_weights, device, args.preprocess)
    if missing:
        reference = make_reference(job.config, net, root=job.run.datasets,
                                   keep_features=bool({"kid", "pr"} & set(job.metrics)))
    else:
        reference = job.reference()
    return Evaluation(reference, net, job.metrics, bootstrap=args.bootstrap)


def report(job, diffusion, results, seconds):
    from runners.evaluation.metrics import append_log, summary

    weights = diffusion.weights
    details = {
        "weights": str(job.weights), "weights_fingerprint": weights.fingerprint, "weights_kind": weights.kind,
        "step": weights.step, "epoch": weights.epoch, "sampler": job.settings, "network_calls": job.calls,
        "seeds": job.seed_text, "batch_size": job.batch_size, "amp": str(diffusion.amp or "off"),
        "device": str(diffusion.device), "compiled": diffusion.compiled, "seconds": round(seconds, 2),
        "comment": job.args.comment,
    }
    print(summary(results))                          # first: a log that cannot be written must not cost the number
    append_log(job.fid_log, job.weights, results, details)
    print(f"log     {job.fid_log}")


def main(argv=None) -> int:
    return run_script(__file__, argv, parse, check, work)


if __name__ == "__main__":
    sys.exit(main())
