"""One experiment a file: get_config() returns an ml_collections.ConfigDict; the docstring says what it shows."""
