"""Tables of MagCache: by how much the residual of each step differs in length from the one before.

R[k] is the mean over the tokens of |r(k)| / |r(k-1)|, where r(k) is what all blocks of step k add to their input.

T2V and I2V are the published ones for Wan2.2-A14B, by the authors of MagCache (arXiv 2506.09045,
https://github.com/Zehong-Ma/MagCache): in 40 steps with the official shift, 12 for T2V and 5 for I2V. The dip at step
26 or 15 is the change of experts. They are of the conditional branch. The unconditional one differs by 0.0027 (T2V) and
0.0008 (I2V) at most, so both branches use them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import BadRequest
from .checks import Checks
from .phases import MAX_STEPS

check = Checks(BadRequest)

MIN_CACHED_STEPS = 10
"""With fewer steps, each differs too much from the last for one to take what another has computed."""

T2V = (
    *(1.0, 1.00124, 0.99822, 0.99696, 0.99703, 0.9966, 0.99602, 0.99578, 0.99484, 0.99633),
    *(0.99659, 0.99534, 0.99584, 0.99681, 0.99563, 0.9944, 0.99594, 0.99466, 0.99453, 0.99389),
    *(0.99391, 0.99354, 0.99283, 0.99268, 0.99057, 0.99125, 0.65523, 0.98808, 0.98765, 0.9851),
    *(0.98311, 0.9805, 0.97776, 0.97278, 0.96731, 0.95857, 0.94385, 0.92118, 0.88108, 0.80263),
)
I2V = (
    *(1.0, 0.99191, 0.99356, 0.99326, 0.99251, 0.99393, 0.9943, 0.99276, 0.99389, 0.99274),
    *(0.99316, 0.99379, 0.99268, 0.99222, 0.99175, 0.91076, 0.98931, 0.99087, 0.98852, 0.98895),
    *(0.98806, 0.9871, 0.98613, 0.98434, 0.983, 0.98185, 0.98131, 0.9783, 0.97619, 0.97264),
    *(0.97088, 0.96568, 0.96045, 0.95322, 0.94579, 0.93297, 0.91699, 0.89174, 0.8541, 0.79823),
)


def tables_from(value: Any) -> tuple[tuple[float, ...], ...] | None:
    """One table for both branches, or one for each: [[conditional], [unconditional]], as in LightX2V. A list without a
    table, as in some of its files, is none."""
    expected = f"one or two lists of {MIN_CACHED_STEPS} to {MAX_STEPS} numbers: [[conditional], [unconditional]]"
    if value is None or value == []:
        return None
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence) or not 1 <= len(value) <= 2:
        check.bad("magcache_ratios", value, expected)
    for table in value:
        if isinstance(table, (str, Mapping)) or not isinstance(table, Sequence):
            check.bad("magcache_ratios", value, expected)
        if not MIN_CACHED_STEPS <= len(table) <= MAX_STEPS:
            check.bad("magcache_ratios", f"a list of {len(table)}", expected)
    return tuple(tuple(check.real("magcache_ratios", ratio, 0.0, 100.0) for ratio in table) for table in value)
