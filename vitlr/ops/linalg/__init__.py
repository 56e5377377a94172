"""What calibration and solving compute: Grams, eigenproblems, eliminations."""
