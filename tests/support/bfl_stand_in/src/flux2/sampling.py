import math


def get_schedule(steps, tokens):
    at_200, at_10 = 0.00016927 * tokens + 0.45666666, 8.73809524e-05 * tokens + 1.89833333
    mu = at_200 if tokens > 4300 else at_200 + (200 - steps) * (at_10 - at_200) / 190
    even = [1 - i / steps for i in range(steps)]
    return [math.exp(mu) / (math.exp(mu) + 1 / t - 1) for t in even] + [0.0]
