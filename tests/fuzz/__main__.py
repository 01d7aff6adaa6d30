"""Checks generated programs: python -m tests.fuzz --first 0 --count 200."""

import argparse
import time
import traceback

from tests.fuzz import check, grammar


def main() -> int:
    """Prints every program that breaks a promise; the number of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--count", type=int, default=200, help="number of programs")
    parser.add_argument("--trace", action="store_true", help="show where it failed")
    asked = parser.parse_args()
    check.silent()
    broken, start = 0, time.process_time()
    for seed in range(asked.first, asked.first + asked.count):
        made = grammar.program(seed)
        try:
            check.check(made, seed)
        except Exception as error:  # every failure is a finding
            broken += 1
            told = " ".join(str(error).split())[:400]
            print(f"seed {seed}: {made.text}\n  {type(error).__name__}: {told}")
            if asked.trace:
                traceback.print_exc()
    seconds = time.process_time() - start
    print(f"{asked.count} programs, {broken} broken, {seconds:.0f} CPU seconds")
    return broken


if __name__ == "__main__":
    raise SystemExit(bool(main()))
