"""What happens inside a training process. May import torch."""
