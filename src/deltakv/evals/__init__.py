"""What a method does to a model's output: fidelity to full attention, recall of its picks, text."""
