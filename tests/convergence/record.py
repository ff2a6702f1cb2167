"""Write the golden trajectories anew: `python -m tests.convergence.record`."""

from tests.convergence.test_golden_trajectories import GOLDEN, trajectories

if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, losses in trajectories().items():
        lines = [f"{step} {loss:.12f}\n" for step, loss in enumerate(losses)]
        (GOLDEN / f"{name}.txt").write_text("".join(lines))
        print(f"{name}: {losses[0]:.4f} -> {losses[-1]:.4f}")
