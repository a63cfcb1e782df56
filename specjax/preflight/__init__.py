"""What a TPU that is not there would do with a target, a drafter and a batch: compiled for it, and not run."""
