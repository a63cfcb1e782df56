"""Draft heads (EAGLE, EAGLE-3, MTP): what they are made of, as data, and the one network that runs them all."""
