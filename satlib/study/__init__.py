"""How the notebooks' numbers are made and kept: plans, runs, records, results and figures."""
