"""The target: one decoder for every supported family, as pure functions of params and cache."""
