"""Commands beside a run, and their helpers: `python siri.py --report`, `--play`, `--bench` and `--check` start those here."""
