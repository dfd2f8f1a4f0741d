"""What pooling costs and what is right about it, measured: `python -m benchmarks.run` from the root of the sources."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the sources
