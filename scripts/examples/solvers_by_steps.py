"""Heun and others against Euler: the error that is left after so many velocities.

    python scripts/examples/solvers_by_steps.py

The truth has many steps of the midpoint method. A velocity is what costs time.
"""

from example import SCENE, parse

args = parse(__doc__, truth=100, most=24)

import flux
from flux.solvers import SOLVERS

pipe = flux.load(args.model)
features = pipe.encode(SCENE)
options = dict(features=features, seeds=[args.seed], guidance=1.0)


def counting(solver):
    """Return the solver, and a list that gets an entry for each velocity."""
    calls = []

    def solve(velocity, *rest):
        return solver(lambda x, t: calls.append(t) or velocity(x, t), *rest)

    return solve, calls


truth = pipe.sample(steps=args.truth, solver="midpoint", **options)
counts = [steps for steps in (4, 6, 8, 12, 16, 24, 32, 48) if steps <= args.most]
print("| velocities | " + " | ".join(map(str, counts)) + " |")
print("|---|" + "---|" * len(counts))
for name, solver in SOLVERS.items():
    if name == "dpmpp_2m_sde":  # draws noise, so it has another image
        continue
    cells = []
    for count in counts:
        steps = count if name not in ("heun", "midpoint") else count // 2
        solve, calls = counting(solver)
        x = pipe.sample(steps=steps, solver=solve, **options)
        assert count - len(calls) in (0, 1)  # Heun's last step takes one
        cells.append(f"{((x - truth).norm() / truth.norm()).item():.4f}")
    print(f"| {name} | " + " | ".join(cells) + " |")
