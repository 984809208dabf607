"""What each command of diagnose.py measures on one run."""

from functools import cached_property

from runners.diagnosis.likelihood import likelihood, write_published
from runners.diagnosis.measures import Diagnosis, fid_of_scalings
from runners.diagnosis.summary import SUMMARIES
from runners.diagnosis.trajectories import Trajectories
from runners.distributed import on_rank_zero
from runners.sampling.gamma import write_gamma


class Measured:
    """One run under measurement; passes that several measures share are made once.

    Args:
        job: The request of diagnose.py.
        name: Of the run.
        diagnosis: Diagnosis.
    """

    def __init__(self, job, name: str, diagnosis: Diagnosis):
        self.job, self.name, self.diagnosis = job, name, diagnosis

    @cached_property
    def trajectories(self) -> Trajectories:
        return Trajectories(self.diagnosis)

    def say(self, text: str) -> None:
        on_rank_zero(lambda: print(f"{self.name}  {text}"))


def eps_norm(run: Measured):
    """Norm of the predicted noise, in training and along the chain, and their ratio.

    A ratio above 1 that grows towards the image is the drift that exposure bias accumulates.
    """
    return run.diagnosis.eps_norms(), {}


def exposure(run: Measured):
    """Variance of the chain minus that of the noised images, step by step."""
    return run.diagnosis.exposure(run.job.starts), {}


def gap(run: Measured):
    """Gap between predicted and true noise along a chain from noised images, and the gap that has accumulated."""
    return run.diagnosis.gaps(), {}


def spectrum(run: Measured):
    """Energy in the bands of a Haar transform, of inputs and estimates along the chain; spectrum of its images."""
    return run.trajectories.spectra(), {}


def snr(run: Measured):
    """Effective time: at which noise level training would give the network what the chain gives it."""
    return run.trajectories.effective_times(), {}


def gamma(run: Measured):
    """Gamma_t, the size of the predicted noise for each pixel, forward and along the chain; writes it for --gamma."""
    job, rows, diagnosis = run.job, run.trajectories.gammas(), run.diagnosis
    path = job.result("gamma", f"{run.name.replace('/', '-')}.json")
    on_rank_zero(lambda: write_gamma(path, rows, diagnosis.diffusion, {
        "run": run.name, "weights_file": str(job.runs[run.name][1]), "images": diagnosis.images.name,
        "num_images": len(diagnosis.chosen), "seed": diagnosis.seed}))
    if job.settings.sample_type in ("ddpm_noisy", "generalized") and job.settings.var_type != "analytic":
        run.say(f"for analytic variances: {job.command(run.name, var_type='analytic', gamma=str(path))}")
    return rows, {"gamma": str(path)}


def energy(run: Measured):
    """Energy of the estimated images, forward and along the chain, beside that of the data."""
    return run.trajectories.energies(), {}


def fit_eps_scaler(run: Measured):
    """Find the epsilon scaling K,B that gives the chain the eps-norms of training.

    The chain is run again and again with the same seeds; a fit holds for the number of steps it was made with.
    """
    job, args = run.job, run.job.args
    fit, rows = run.diagnosis.fit(args.model)
    scaler = f"{fit.k:.4g},{fit.b:.5g}" if fit.k else f"{fit.b:.5g}"
    advice = ("no correction of exposure bias: it is too far from 1, or leaves the norms as far off" if
              run.diagnosis.is_no_correction(fit) else job.command(run.name, eps_scaler=scaler))
    errors = f"standard errors {fit.k_error:.1g}, {fit.b_error:.1g}" if fit.k else f"standard error {fit.b_error:.1g}"
    run.say(f"eps_scaler {scaler}  ({errors})\n"
            f"eps-norms (median of the steps) off by {fit.before:.2%} without, {fit.mismatch:.2%} with it\n{advice}")
    details = {"fit": fit._asdict()}
    if args.fid_check:
        details["fid"] = fid_of_scalings(run.diagnosis, fit, args.fid_check, job.reference(run.name),
                                         args.inception_weights)
        on_rank_zero(lambda: [print("{name:10} {fid:9.4f}  eps_scaler {k:.4g},{b:.5g}".format(**each))
                              for each in details["fid"]])
    return rows, details


def nll(run: Measured):
    """Negative log likelihood of real images in bits per dimension, with its terms at each step.

    By default over all steps, with learned variances where the network has them, and clipped estimates. What is
    finished of a long measurement is kept: the same command goes on.
    """
    beside = run.job.result("nll", "json").with_suffix("")
    beside = beside.with_name(f"{beside.name}-{run.name.replace('/', '-')}")
    rows, summary = likelihood(run.diagnosis, beside)
    run.say(f"{summary['bits_per_dim']:.4f} bits/dim  (standard error {summary['standard_error']:.2g}, "
            f"{summary['num_images']} images, {len(rows)} steps; of these {summary['prior_bits']:.2g} in the prior)")
    if run.job.args.npz:
        on_rank_zero(lambda: write_published(rows, beside))
    return rows, summary


MEASURES = {"eps-norm": eps_norm, "exposure": exposure, "gap": gap, "spectrum": spectrum, "snr": snr, "gamma": gamma,
            "energy": energy}                              # those of ``all``, in its order
COMMANDS = {**MEASURES, "fit-eps-scaler": fit_eps_scaler, "nll": nll}


def measure(command: str, run: Measured):
    """(rows, details) of a command; says its main figures."""
    rows, details = COMMANDS[command](run)
    if command in SUMMARIES:
        run.say(SUMMARIES[command](rows))
    return rows, details
