"""The machinery of `compare.py` and `steady_state.py`: programs, peers, rounds, bars."""
