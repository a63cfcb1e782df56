"""Training of draft heads: responses of the target, features, losses, the loop."""
