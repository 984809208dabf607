"""The five lines of diagnose.py all, each way it can turn out."""

import pytest

from configs.schema import Config
from functions.schedule import FlowSchedule, SigmaSchedule
from models.ema import decay_of, first_share
from runners.diagnosis.trajectories import inverted, nearby_times
from runners.diagnosis.verdict import verdict
from runners.training.metrics_file import read_metrics
from tests.functions.gaussian import SCHEDULE


def config(**training):
    return Config.model_validate({"data": {"dataset": "DIGITS", "image_size": 8, "channels": 1},
                                  "model": {"in_channels": 1, "out_ch": 1, "ch": 32,
                                            "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": []},
                                  "training": training})


def norms(*ratios, error=0.001):
    return [{"evaluation": "first", "t": float(t), "ratio": ratio, "ratio_error": error}
            for t, ratio in enumerate(ratios)]


def lines(losses, held_out=()):
    return [{"step": n, "loss_base": loss} for n, loss in enumerate(losses)] + [
        {"step": n, "validation_loss": loss} for n, loss in enumerate(held_out)]


NOISE = [0.01 * (-1) ** n for n in range(100)]


@pytest.mark.parametrize(("losses", "held_out", "step", "training", "ratios", "found"), [
    ([1 - n / 100 for n in range(100)], [], 99, {}, [1.2, 1, 1, 1, 1, 1],
     ["which is few", "still cold, 99%", "still falling", "not measured", "none that can be told"]),
    ([1 + e for e in NOISE], [1.0, 1.0], 200_000, {}, [1, 1, 1.03, 1, 1, 1],
     ["of the order of", "warm", "flat", "no higher", "finds more noise in its chain"]),
    ([1 + n / 100 for n in range(100)], [1.0, 3.0], 200_000, {}, [1, 1, 0.97, 1, 1, 1],
     ["of the order of", "warm", "rising", "the network memorises", "finds less noise in its chain"]),
    ([1 + e for e in NOISE], [1.3, 1.2], 200_000, {"ema": []}, [1, 1, 1.3, 1, 1, 1],
     ["of the order of", "raw weights", "flat", "but not rising", "large"]),
    ([1.0], [], None, {}, [1, 1, 1, 1, 1, 1], ["which is few", "cold", "too few", "not measured",
                                               "none"]),
])
def test_the_five_lines(losses, held_out, step, training, ratios, found):
    got = verdict(config(**training), lines(losses, held_out), step, True, norms(*ratios))
    assert [line.partition(":")[0] for line in got] == ["Steps", "Average", "Loss", "Held-out loss", "Drift"]
    for line, word in zip(got, found, strict=True):
        assert word in line, line


def test_drift_is_more_than_the_worst_of_many_rows_may_be_off():
    """Of 45 rows one is off by 2.5 standard errors for nothing; a smaller drift that is sure counts before it."""
    ratios = [1.0] * 50
    ratios[10] = 1.025
    drift = verdict(config(), [], 100, True, norms(*ratios, error=0.01))[-1]
    assert "none that can be told from chance (eps-norm +2.5% at t = 10" in drift
    rows = norms(*ratios, error=0.01)
    rows[20].update(ratio=1.02, ratio_error=0.001)
    drift = verdict(config(), [], 100, True, rows)[-1]
    assert "finds more noise in its chain than in training (eps-norm +2.0% at t = 20" in drift


def test_share_of_the_first_weights_in_an_average():
    def share(updates=100, enough=0.0, **average):
        return first_share(decay_of(config(ema=[average]).training.ema[0], 10), updates, enough)

    assert share(rate=0.99) == pytest.approx(0.99**100) and share(updates=0, rate=0.99) == 1
    assert share(updates=2, rate=0.9999, warmup=True) == pytest.approx(2 / 11 * 3 / 12), "as the average itself has it"
    assert share(updates=10**9, enough=0.05, rate=0.9) == pytest.approx(0.9**29), "does not go on"
    assert share(rate=0.9999, warmup=True) < 1e-6 and share(length=0.1) == 0
    assert share(half_life=1000, ramp_up=0) == pytest.approx(0.5) and share(half_life=1000) == 0


def test_half_a_line_is_passed_over(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss_base": 2}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "loss_base": 2}] and read_metrics(tmp_path / "none") == []


def test_the_effective_time_is_where_the_curve_has_the_value():
    times, values = [0, 40, 50, 60, 100], [0.0, 4.0, 5.0, 6.0, 10.0]
    assert inverted(times, values, 5.5) == (55.0, 0.1) and inverted(times, values, 4.5) == (45.0, 0.1)
    assert inverted(times, values, 12.0) == (120.0, 0.1) and inverted(times, values, -1.0) == (-10.0, 0.1)
    assert inverted([5], [1.0], 2.0) == (5.0, 0.0)


@pytest.mark.parametrize(("schedule", "steps"), [(SCHEDULE, [0, 250, 999]), (SCHEDULE, [7]),
                                                 (SigmaSchedule(), [0.002, 1.0, 80.0]), (FlowSchedule(), [0.5, 1.0])])
def test_times_around_a_step_are_possible_and_hold_the_step(schedule, steps):
    for place, s in enumerate(steps):
        times = nearby_times(schedule, steps, place)
        assert s in times and times == sorted(set(times)) and len(times) >= 2 or steps == [7]
        assert all(t > schedule.end for t in times) and times[-1] <= max(schedule.start, steps[-1])
