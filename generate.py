"""Generate images from seeds, compute their FID and log it, on any number of processes."""

import argparse
import logging
import sys
import time
from contextlib import ExitStack

from runners.cli import Parser, add_common, natural, positive, run_script
from runners.sampling.flags import add_sampler_flags

log = logging.getLogger(__name__)


def parse(argv):
    parser = Parser(prog="generate.py", description=__doc__)
    add_common(parser)
    on_off = argparse.BooleanOptionalAction
    weights = parser.add_argument_group("weights")
    weights.add_argument("--ckpt_id", type=int, help="epoch (default: sampling.ckpt_id, else the newest)")
    weights.add_argument("--model_ema", action=on_off, default=True, help="averaged rather than raw weights")
    weights.add_argument("--weights", metavar="FILE", help="load this file or folder instead of a run's checkpoint")
    weights.add_argument("--ema_length", type=float, metavar="W", help="make up the average of this relative width "
                         "from the run's power-function averages")
    weights.add_argument("--guide_weights", metavar="FILE", help="guide by this worse network (autoguidance); its "
                         "configuration is the config.yml beside it, else the same")
    weights.add_argument("--classifier", metavar="FILE", help="guide by the gradient of this noisy classifier "
                         "(guided-diffusion's), for generalized and ddpm_noisy")
    weights.add_argument("--classifier_scale", type=float, metavar="S",
                         help="factor of that gradient, such as 1; --classifier needs it")
    images = parser.add_argument_group("images")
    images.add_argument("-i", "--image_folder", help="relative: under exp/image_samples/; absolute: as given "
                                                     "(default: DOC)")
    images.add_argument("--num_samples", type=positive, help="how many (default: 50000, or as --seeds says)")
    images.add_argument("--seeds", metavar="LIST", help='such as "0-63" or "1,2,5-10" (default: 0 to num_samples - 1)')
    images.add_argument("--prompt", action="append", metavar="TEXT", help="what to make, for text-to-image networks; "
                        "several: give it again")
    images.add_argument("--prompt_file", metavar="FILE", help="a prompt on each line")
    images.add_argument("--negative_prompt", metavar="TEXT", help="what --guidance leads away from (default: what the "
                        "pipeline takes without one)")
    images.add_argument("--save", choices=["png", "npz", "none"], default="png",
                        help="none: images only pass through the metrics")
    images.add_argument("--subdirs", action="store_true", help="sub-folders of 1,000 images")
    images.add_argument("--grid", type=natural, metavar="N", help="picture of the first N images, beside the folder; "
                        "0: none (default: 64, or 0 with --save none)")
    images.add_argument("--interpolation", action="store_true", help="instead: a picture of paths between 8 seeds")
    images.add_argument("--sequence", action="store_true", help="instead: a picture of the chains of 8 seeds")
    images.add_argument("--reconstruct", metavar="PATH", help="instead: encode the first images of this folder, zip or "
                        "npz by DDIM's reversed chain, decode them, write pairs and errors (--seeds: which images)")
    add_sampler_flags(parser, timesteps=None)
    sampler = parser.add_argument_group("computing")
    sampler.add_argument("--batch_size", type=number_or_auto, metavar="N", help="images at a time, which does not "
                         "change them; auto: what fills the device (default: sampling.batch_size)")
    sampler.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="off",
                         help="precision; auto: bf16 where the device multiplies it")
    sampler.add_argument("--compile", choices=["auto", "on", "off"], default="auto",
                         help="torch.compile; auto: where it saves more time than it takes")
    fid = parser.add_argument_group("FID")
    fid.add_argument("--fid", action=on_off, default=True, help="compute it, or whatever --metrics names")
    fid.add_argument("--fid_log", metavar="FILE", help="log to append to, a .jsonl beside it (default: EXP/fid.txt)")
    fid.add_argument("--fid_stats", metavar="FILE", help="reference statistics (default: sampling.fid_stats); "
                                                         "auto: make them from the data set if they are missing")
    fid.add_argument("--inception_weights", metavar="FILE", help="weights of the feature network")
    fid.add_argument("--metrics", default="fid",
                     help="comma list of fid,sfid,kid,is,is_blocks,pr,digits_fd,digits_unsure")
    fid.add_argument("--interval", action="store_true", help="95%% interval for the FID of so many images")
    fid.add_argument("--force", action="store_true", help="compare with a reference that was made for something else")
    fid.add_argument("--preprocess", choices=["pytorch-fid", "tf1"], default="pytorch-fid",
                     help="resize to 299x299")
    parser.add_argument("--export", metavar="DIR", help="make no images: write the network as a folder that diffusers "
                        "(ADM, EDM: the programs they come from) loads, with a model card")
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
    if args.export:
        from runners.export import check_export

        check_export(job, args.export)
    for metric in job.metrics:
        choose(METRICS, metric, "--metrics")
    job.reference()
    return job


def work(job, device):
    from configs.sampling import SamplerSettings
    from runners.compilation import resolve_sampling_compile
    from runners.distributed import on_rank_zero, world_size
    from runners.network import fill_device
    from runners.sampling.dry_run import dry_run_sampling
    from runners.sampling.prompts import prompts_of
    from utils.locks import lock_folder

    args = job.args
    for note in job.notes:
        on_rank_zero(lambda note=note: print(note))
    if args.dry_run:
        return dry_run_sampling(job, device)
    diffusion = open_networks(job, device)
    if args.export:
        from runners.export import export

        return on_rank_zero(lambda: export(job, diffusion, args.export))
    if hasattr(diffusion.codec, "network"):
        diffusion.codec.network(device)              # a broken autoencoder is told before anything is sampled
    diffusion.prompts = prompts_of(job, device)
    sampler = diffusion.sampler(job.settings)
    share = -(-len(job.seeds) // world_size())
    if job.batch_size == "auto":                                              # the same on all ranks
        guided = job.settings.model_dump(include={"guidance", "classifier_scale", "classes"})
        short = diffusion.sampler(SamplerSettings(timesteps=2, **guided))
        job.batch_size = on_rank_zero(lambda: fill_device(device, diffusion.codec.shape, share,
                                                          lambda count: short(range(count))))
    diffusion.compiled = on_rank_zero(lambda: resolve_sampling_compile(args.compile, diffusion, sampler, share,
                                                                       job.batch_size))
    sampler = diffusion.sampler(job.settings)
    with ExitStack() as held:
        if args.save != "none" or job.pictures:
            on_rank_zero(lambda: held.enter_context(lock_folder(job.folder.path)))
        if job.pictures:
            return on_rank_zero(lambda: draw_pictures(job, sampler))
        produce(job, diffusion, sampler)


def open_networks(job, device):
    """The network with its weights, and the one that guides it where one is named."""
    from runners.diffusion import Diffusion
    from runners.distributed import gather_objects, on_rank_zero
    from runners.network import explain_amp, resolve_amp
    from utils.errors import UserError

    amp = on_rank_zero(lambda: resolve_amp(job.args.amp, device))             # CPUs may differ
    if job.args.amp == "auto":
        log.info("amp %s", explain_amp(job.args.amp, device))

    def opened(config, load):
        diffusion = Diffusion(config, device)
        load(diffusion)
        diffusion.amp = amp
        return diffusion

    weights = on_rank_zero(lambda: job.weights)                               # "newest" may change between ranks
    if job.args.ema_length is not None:
        diffusion = opened(job.config, lambda each: each.load_average(job.run, job.args.ckpt_id, job.args.ema_length))
    else:
        diffusion = opened(job.config, lambda each: each.load(weights, job.args.model_ema))
    if job.guide:
        diffusion.guide = opened(job.guide[0], lambda each: each.load(job.guide[1], job.args.model_ema))
    if len(set(gather_objects(diffusion.weights.fingerprint))) > 1:
        error = UserError(f"{weights} was replaced while the ranks read it; run the command again")
        error.on_all_ranks = True
        raise error
    if job.classifier:
        diffusion.classifier = job.classifier.to(device, amp)
    return diffusion


def draw_pictures(job, sampler):
    from runners.sampling.pictures import interpolation_grid, open_originals, reconstruct, sequence_grid
    from utils.png import save_png

    for wanted, name, draw in ((job.args.interpolation, "interpolation", interpolation_grid),
                               (job.args.sequence, "sequence", sequence_grid)):
        if wanted:
            path = job.folder.path.with_name(f"{job.folder.path.name}_{name}.png")
            save_png(draw(sampler, job.seeds), path)
            print(path)
    if job.args.reconstruct:
        originals = open_originals(job.args.reconstruct, job.config)
        reconstruct(sampler, job.args.reconstruct, originals, job.seeds, job.batch_size, job.folder.path)


def produce(job, diffusion, sampler):
    """Make the images, feed the metrics, write the grid and the log."""
    from runners.distributed import on_rank_zero
    from runners.sampling.folder import manifest_of
    from runners.sampling.generation import generate_and_measure, write_grid
    from runners.sampling.writers import open_writer

    args, started = job.args, time.perf_counter()
    evaluation = open_evaluation(job, diffusion.device)
    if args.save != "none":
        manifest = manifest_of(diffusion, job.settings)
        if args.save == "npz":                       # rows have no names: which seed is where is part of the request
            manifest["seeds"] = job.seed_text
        on_rank_zero(lambda: job.folder.prepare(manifest))
    labels = sampler.labels(job.seeds) if args.save == "npz" else None
    writer = open_writer(args.save, job.folder, len(job.seeds), job.config.data.shape, labels)
    try:
        made = generate_and_measure(sampler, job.seeds, job.batch_size, writer=writer, evaluation=evaluation,
                                    keep=job.grid)
    except KeyboardInterrupt:
        if args.save != "none":
            log.warning("what is made so far is kept in %s; the same command goes on", job.folder.path)
        raise
    if job.grid:
        write_grid(made.shown, job.grid_path, sampler, job.seeds)
        on_rank_zero(lambda: print(f"grid    {job.grid_path}"))
    if args.save != "none":
        on_rank_zero(lambda: print(f"images  {job.folder.path}"))
    if evaluation:
        on_rank_zero(lambda: report(job, diffusion, sampler, made.results, time.perf_counter() - started))


def open_evaluation(job, device):
    """The metrics, with their reference, or None; ``--fid_stats auto`` makes a reference that is missing."""
    from models.inception import load_inception
    from runners.distributed import on_rank_zero
    from runners.evaluation.metrics import Evaluation, complete_reference, make_reference, needs

    args = job.args
    if not job.wants_fid:
        return None
    missing = on_rank_zero(lambda: job.reference() is None)
    net = load_inception(args.inception_weights, device, args.preprocess)
    if missing:
        reference = make_reference(job.config, net, root=job.run.datasets, **needs(job.metrics))
    else:
        reference = job.reference()
        complete_reference(reference, net, job.metrics)
    return Evaluation(reference, net, job.metrics, interval=args.interval)


def report(job, diffusion, sampler, results, seconds):
    from runners.evaluation.metrics import append_log, summary
    from runners.sampling.folder import gamma_fingerprint

    weights = diffusion.weights
    details = {
        "weights": job.weights_name, "weights_fingerprint": weights.fingerprint, "weights_kind": weights.kind,
        "step": weights.step, "epoch": weights.epoch,
        "sampler": {**job.settings.model_dump(mode="json"), **gamma_fingerprint(job.settings)},
        "network_calls": sampler.calls, "seeds": job.seed_text, "batch_size": job.batch_size,
        "guide": diffusion.guide and diffusion.guide.weights.fingerprint, "ema_length": job.args.ema_length,
        "classifier": diffusion.classifier and diffusion.classifier.fingerprint,
        "prompts": diffusion.prompts and diffusion.prompts.texts,
        "negative_prompt": diffusion.prompts and diffusion.prompts.negative,
        "amp": str(diffusion.amp or "off"), "device": str(diffusion.device), "compiled": diffusion.compiled,
        "seconds": round(seconds, 2), "comment": job.args.comment,
    }
    print(summary(results))                          # first: a log that cannot be written must not cost the number
    append_log(job.fid_log, job.weights_name, results, details)
    print(f"log     {job.fid_log}")


def main(argv=None) -> int:
    return run_script(__file__, argv, parse, check, work)


if __name__ == "__main__":
    sys.exit(main())
