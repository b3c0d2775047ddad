"""Many fine-tunes that differ in what is to be compared: planned, run cell by cell, collected."""
