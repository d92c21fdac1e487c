"""The one table of tolerances, by dtype of the input and number of elements added up.

A sum of n numbers is compared with the float64 oracle of the same inputs, relative to the sum of
the magnitudes that were added (so that cancellation in a signed sum is not held against it).
"""

import math

import torch

# Unit roundoff of the arithmetic that each dtype is summed in: inputs of 16 bits are exact in
# float32, so theirs is float32's.
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-24,
    torch.float16: 2.0**-24,
}
# filter_sums are float32 whatever they were computed in; layer_sums keep float64.
FLOAT32_RESULT = 2.0**-24


# No lane of any kernel holds more terms before they go to float64 (on the CPU 32).
LANE = 256


def relative(dtype: torch.dtype, length: int, *, float32_result: bool) -> float:
    """Allowed error of a sum of ``length`` terms, relative to the sum of their magnitudes.

    A product rounds once. The roundings of a sum add up like a random walk of steps below one
    unit, first in a lane, then in float64; twice the square root covers every sum of up to four
    terms, and seven standard deviations of a long one.
    """
    lane = ROUNDOFF[dtype] * (1 + 2 * math.sqrt(min(length, LANE)))
    total = ROUNDOFF[torch.float64] * (1 + 2 * math.sqrt(length))
    return lane + total + (FLOAT32_RESULT if float32_result else 0.0)
