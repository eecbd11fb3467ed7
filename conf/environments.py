"""What `stage.environment` may begin with; train/rl/environments.py makes them."""

ENVIRONMENTS = ("reasoning_gym:", "questions:", "verifiers:", "custom:")
