"""How remedies are written in a sampler's settings: text, lists, short forms; what has no meaning."""

import pytest
from pydantic import ValidationError

from configs.sampling import SamplerSettings
from functions.denoising import SAMPLERS


@pytest.mark.parametrize(("key", "given", "value"), [
    ("dcw", "0.05", (0.05, 0.0)), ("dcw", 0.05, (0.05, 0.0)), ("dcw", "0.05,0.01", (0.05, 0.01)),
    ("dcw", [0.05, "pixel"], (0.05, "pixel")), ("dcw", "0", None), ("dcw", "0,pixel", None), ("dcw", [0, 0], None),
    ("dcw", "0,0.02", (0.0, 0.02)), ("dcw", "-0.01", (-0.01, 0.0)),
    ("time_shift", "40,300", (40, 300, "paper", 0)), ("time_shift", [40, 300, "code", 0.25], (40, 300, "code", 0.25)),
    ("time_shift", "0,300", None),
    ("restart", "3,2,0.14,0.3", ((3, 2, 0.14, 0.3, 1.0),)), ("restart", [3, 2, 0.14, 0.3], ((3, 2, 0.14, 0.3, 1.0),)),
    ("restart", "3,2,0.14,0.3,1.003;4,1,5,9", ((3, 2, 0.14, 0.3, 1.003), (4, 1, 5.0, 9.0, 1.0))),
    ("restart", "3,0,0.14,0.3", None), ("restart", "3,0,0.14,0.3;3,1,5,9", ((3, 1, 5.0, 9.0, 1.0),)),
])
def test_forms_of_a_remedy(key, given, value):
    settings = SamplerSettings(**{key: given})
    assert getattr(settings, key) == value
    assert SamplerSettings(**settings.given()) == settings and hash(settings) == hash(SamplerSettings(**{key: given}))
    assert (value is None) == (settings == SamplerSettings()) and (value is None) == (str(settings) ==
                                                                                      str(SamplerSettings()))


@pytest.mark.parametrize(("keys", "message"), [
    ({"dcw": "a"}, "valid number"), ({"dcw": "1,2,3"}, "at most 2"), ({"time_shift": "40,300,papre"}, "'paper' or"),
    ({"time_shift": "-1,300"}, "greater than or equal to 0"), ({"restart": "3,2"}, "required"),
    ({"restart": "1,2,0.1,0.3"}, "greater than or equal to 2"),
    ({"restart": "3,2,0.1,0.3", "sample_type": "ddpm_noisy"}, "restart is for generalized and heun and euler"),
    ({"restart": "3,2,0.1,0.3", "sample_type": "dpmpp_2m"}, "restart is for generalized and heun and euler"),
    ({"var_type": "analytic"}, "belong together"), ({"gamma": "f.json"}, "belong together"),
    ({"var_type": "analytic", "gamma": "f", "sample_type": "heun"}, "var_type is for generalized and ddpm_noisy"),
    ({"var_type": "fixedsmall"}, "var_type fixedsmall is for ddpm_noisy"),
    ({"var_type": "analytic", "gamma": "f", "guidance": 2.0}, "leave out guidance"),
    ({"time_shift": "40,300", "churn": (40,), "sample_type": "heun"}, "use one of them"),
    ({"time_shift": "40,300", "ode_time": "ve", "sample_type": "heun"}, "use one of them"),
])
def test_what_has_no_meaning_is_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        SamplerSettings(**keys)


def test_what_a_flag_says_is_what_settings_read():
    from runners.sampling.flags import flag_text

    settings = SamplerSettings(dcw="0.05,pixel", time_shift="40,300", restart="3,2,0.14,0.3;4,1,5,9,1.003")
    for key in ("dcw", "time_shift", "restart"):
        assert getattr(SamplerSettings(**{key: flag_text(getattr(settings, key))}), key) == getattr(settings, key)


def test_every_sampler_has_options():
    from runners.sampling.steps import OPTIONS

    assert OPTIONS.keys() == SAMPLERS.keys()
