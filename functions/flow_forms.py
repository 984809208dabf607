"""EDM's ablation: the same probability flow, stepped along in other times and scales (2206.00364, table 1, appendix C).

Notation: y = x_0 + s n with level s = sigma(tau), X = c(tau) y, e the estimate of n; dots are derivatives by tau. The
flow dy = e ds becomes

    dX/dtau = (c'/c) X + c s' e                                                                              eq. 4

and a step of finite length is another one for each choice:

    time      linear  s = tau          ve  s = sqrt(tau)          vp  s = sqrt(exp(beta_d tau^2/2 + beta_min tau) - 1)
    scale     none    c = 1            vp  c = 1/sqrt(1 + s^2), so that X has variance 1 where the data have it

EDM's own choice, linear and none, is what ``functions.ode`` does without this module.
"""

from dataclasses import dataclass
from math import expm1, log1p, sqrt

from functions.levels import RANGES, vp_betas


class LinearTime:
    def level(self, tau: float) -> float:
        return tau

    def slope(self, tau: float) -> float:
        """s'"""
        return 1.0

    def time(self, level: float) -> float:
        return level


class VETime:
    def level(self, tau: float) -> float:
        return sqrt(tau)

    def slope(self, tau: float) -> float:
        return 0.5 / sqrt(tau)

    def time(self, level: float) -> float:
        return level**2


@dataclass(frozen=True)
class VPTime:
    beta_d: float
    beta_min: float

    def level(self, tau: float) -> float:
        return sqrt(expm1(0.5 * self.beta_d * tau**2 + self.beta_min * tau))

    def slope(self, tau: float) -> float:
        level = self.level(tau)
        return 0.5 * (self.beta_min + self.beta_d * tau) * (level**2 + 1) / level

    def time(self, level: float) -> float:
        return (sqrt(self.beta_min**2 + 2 * self.beta_d * log1p(level**2)) - self.beta_min) / self.beta_d


# Of (sigma_min, sigma_max), the range of the chain's levels.
TIMES = {"linear": lambda low, high: LinearTime(), "ve": lambda low, high: VETime(),
         "vp": lambda low, high: VPTime(*vp_betas(low, high))}
SCALES = ("none", "vp")


@dataclass(frozen=True)
class FlowForm:
    """A choice of time and scale, and where the second evaluation of a step lies.

    Attributes:
        time: LinearTime, VETime or VPTime.
        scaled: Whether X has variance 1 (scale vp).
        alpha: The second evaluation lies at this part of the step, in (0, 1]: 1 is Heun's method, 1/2 the midpoint's.
    """

    time: LinearTime | VETime | VPTime = LinearTime()
    scaled: bool = False
    alpha: float = 1.0

    @classmethod
    def of(cls, time: str = "linear", scale: str = "none", alpha: float = 1.0,
           levels: tuple[float, float] = RANGES["vp"]) -> "FlowForm | None":
        """By names; None for EDM's own choice.

        Args:
            levels: Lowest and highest of the chain, from which vp has its constants.

        Raises:
            ValueError: An unknown name, alpha out of its range, or levels that vp cannot have.
        """
        if time not in TIMES or scale not in SCALES:
            name, given, known = ("ode_time", time, TIMES) if time not in TIMES else ("ode_scale", scale, SCALES)
            raise ValueError(f"{name} {given!r} is unknown; known: {', '.join(sorted(known))}")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha {alpha:g} is not in (0, 1]")
        if (time, scale, alpha) == ("linear", "none", 1.0):
            return None
        return cls(TIMES[time](*levels), scale == "vp", alpha)

    def scale(self, level: float) -> float:
        """c"""
        return 1 / sqrt(1 + level**2) if self.scaled else 1.0

    def slope(self, tau: float, y, e):
        """dX/dtau at y, with the noise e there."""
        level, rate = self.time.level(tau), self.time.slope(tau)
        c = self.scale(level)
        bend = -level * rate * c**3 if self.scaled else 0.0                  # c'
        return bend * y + c * rate * e

    def step(self, y, e, level: float, lower: float, evaluate=None):
        """y at the level ``lower``, from y and e at ``level``.

        Args:
            evaluate: (y, level, part of the step) -> e, for the second evaluation; None: Euler's method.
        """
        tau, end = self.time.time(level), self.time.time(lower) if lower > 0 else 0.0       # vp's beta_min may be < 0
        h, x, first = end - tau, self.scale(level) * y, self.slope(tau, y, e)
        if evaluate is None:
            return (x + h * first) / self.scale(lower)
        between = tau + self.alpha * h if self.alpha < 1 else end
        within = self.time.level(between) if self.alpha < 1 else lower
        ahead = (x + self.alpha * h * first) / self.scale(within)
        second = self.slope(between, ahead, evaluate(ahead, within, self.alpha))
        weight = 1 / (2 * self.alpha)
        return (x + h * ((1 - weight) * first + weight * second)) / self.scale(lower)
