import math


def get_schedule(steps, tokens, base_shift=0.5, max_shift=1.15, shift=True):
    mu = base_shift + (max_shift - base_shift) * (tokens - 256) / (4096 - 256) if shift else 0
    even = [1 - i / steps for i in range(steps)]
    return [math.exp(mu) / (math.exp(mu) + 1 / t - 1) for t in even] + [0.0]
