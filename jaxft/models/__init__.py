"""The models: flax modules, their configuration and the formulations of their hot path."""
