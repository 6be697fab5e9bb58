"""Write the digits that the package carries, from the copy that scikit-learn distributes.

    python data_scripts/make_digits.py [FILE]

FILE is minihyperflows/data/embedded/digits.npz of this repository unless given. It then holds

    counts   (1797, 8, 8) uint8   dark pixels in each 4 x 4 block of a 32 x 32 bitmap, 0 to 16
    labels   (1797,) uint8        the digit
    is_test  (1797,) bool         True for the 360 test images, False for the 1,437 training images

The split needs no random numbers: the images are sorted by digit, in their own order within one
digit, and every fifth one is a test image. So each digit has its fifth in the test set, and since
the file goes from writer to writer, each writer has too. scikit-learn is needed here only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

REPOSITORY = Path(__file__).resolve().parents[1]
DESTINATION = REPOSITORY / "minihyperflows" / "lab" / "datasets" / "digits.npz"


def digits_arrays() -> dict[str, np.ndarray]:
    """The three arrays of the file, by name."""
    digits = load_digits()
    by_digit = np.argsort(digits.target, kind="stable")
    is_test = np.zeros(len(by_digit), dtype=bool)
    is_test[by_digit[::5]] = True
    return {
        "counts": digits.images.astype(np.uint8),
        "labels": digits.target.astype(np.uint8),
        "is_test": is_test,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the digits that the package carries.")
    parser.add_argument("file", nargs="?", type=Path, default=DESTINATION)
    file = parser.parse_args().file
    np.savez_compressed(file, **digits_arrays())  # type: ignore[arg-type]
    print(f"wrote {file} ({file.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
