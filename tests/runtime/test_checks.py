"""flux.runtime.checks: a wrong value is refused with its name, a right one kept."""

import math

import pytest

from flux.configs import MODELS
from flux.errors import UserError
from flux.runtime.checks import (
    check_cfg,
    check_count,
    check_guidance,
    check_size,
    check_steps,
    check_true_cfg_scale,
    format_values,
)

DEV, SCHNELL = MODELS["flux.1-dev"], MODELS["flux.1-schnell"]
KLEIN, BASE = MODELS["flux.2-klein-4b"], MODELS["flux.2-klein-base-4b"]

# fmt: off
REFUSED = [
    (check_size, (64, 100), "width: must be a multiple of 16 from 64 to 8192 (got 100). Use 96 or"),
    (check_size, (127, 64), "height: must be a multiple of 16 from 64 to 8192 (got 127). Use 112"),
    (check_size, (64, 0), "(got 0). Use 64."),
    (check_size, (9000, 64), "(got 9000). Use 8192."),
    (check_size, (64, 64.0), "width: must be a whole number (got 64.0)."),
    (check_size, (8192, 8192), "width: 8192 and `height=8192` are 67 megapixels (expected"),
    (check_steps, (DEV, 0), "steps: must be from 1 to 1000 (got 0). flux.1-dev is meant"),
    (check_steps, (DEV, 1001), "steps: must be from 1 to 1000 (got 1001)."),
    (check_steps, (DEV, 2.5), "steps: must be a whole number (got 2.5)."),
    (check_guidance, (DEV, -1, 4), "guidance: must be from 0 to 100 (got -1)."),
    (check_guidance, (DEV, math.nan, 4), "guidance: must be from 0 to 100 (got nan)."),
    (check_guidance, (DEV, [3, 101], 4), "guidance: must be from 0 to 100 (got 101)."),
    (check_guidance, (DEV, [1, 2, 3], 4), "guidance: has 3 values for 4 steps. Give one value"),
    (check_guidance, (DEV, [], 4), "guidance: has 0 values for 4 steps."),
    (check_guidance, (KLEIN, 4.0, 4), "guidance: flux.2-klein-4b takes none (got 4): it was"),
    (check_guidance, (SCHNELL, [3, 1], 4), "guidance: flux.1-schnell takes none (got 3:1)"),
    (check_true_cfg_scale, (101, 4), "true_cfg_scale: must be from 0 to 100 (got 101). 1 is off;"),
    (check_true_cfg_scale, ([1, 2, 3], 4), "true_cfg_scale: has 3 values for 4 steps."),
    (check_cfg, (BASE, None, None, 2.0, 4), "true_cfg_scale: the guidance of flux.2-klein-base"),
    (check_cfg, (KLEIN, None, None, 2.0, 4), "true_cfg_scale: flux.2-klein-4b takes none"),
    (check_cfg, (KLEIN, None, "grey", None, 4), "negative_prompt: flux.2-klein-4b takes none"),
    (check_cfg, (DEV, None, "grey", None, 4), "negative_prompt: has an effect only with `true_cfg"),
    (check_cfg, (BASE, 1.0, "grey", None, 4), "negative_prompt: has an effect only with `guid"),
    (check_count, (0, 7), "num_images: there is nothing to generate."),
    (check_count, (1, -1), "seed: must be from 0 to 2^63 - 1 (got -1)."),
    (check_count, (1, 2**63), f"seed: must be from 0 to 2^63 - 1 (got {2**63})."),
    (check_count, (2, 2**63 - 1), "seed: the last of 2 images would have a seed above 2^63 - 1"),
    (check_count, (10**9 + 1, 0), "num_images: all prompts together have too many images"),
    (check_count, (2**63, 0), f"(got {2**63}, expected at most 1000000000)"),
    (check_count, (1, "seven"), "seed: must be a whole number (got 'seven')."),
]
# fmt: on


@pytest.mark.parametrize("check, arguments, words", REFUSED)
def test_wrong_value_is_refused_with_its_name(check, arguments, words):
    with pytest.raises(UserError) as caught:
        check(*arguments)
    assert words in str(caught.value)


def test_right_values_are_kept():
    assert check_size(64, 8192) == (64, 8192)
    assert check_steps(DEV, None) == DEV.steps and check_steps(DEV, 1000) == 1000
    assert check_guidance(DEV, None, 4) == [DEV.guidance]
    assert check_guidance(DEV, (4, 1), 8) == [4, 1] and check_guidance(DEV, [1, 2, 3], 3) == [
        1,
        2,
        3,
    ]
    assert check_guidance(KLEIN, None, 4) is None and check_guidance(KLEIN, 1.0, 4) is None
    assert check_true_cfg_scale(None, 4) == [1.0] and check_true_cfg_scale(3, 4) == [3]
    assert check_cfg(DEV, None, "grey", 2.0, 4) and check_cfg(BASE, 4.0, "grey", None, 4)
    assert not check_cfg(DEV, None, None, None, 4) and not check_cfg(BASE, 1.0, None, None, 4)
    check_count(2, 2**63 - 2)
    assert [format_values(v) for v in ([4.0], (4, 1), [3, 2, 1.5])] == ["4", "4:1", "3,2,1.5"]


def test_distilled_model_warns_about_other_steps():
    with pytest.warns(UserWarning, match="was distilled for 4 steps, not 8"):
        assert check_steps(KLEIN, 8) == 8
