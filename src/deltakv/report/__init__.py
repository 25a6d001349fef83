"""How results are shown: tables, plots, and pages that stand alone."""
