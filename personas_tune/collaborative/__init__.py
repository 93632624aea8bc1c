"""What ratings alone say: biases, factors, like-minded users."""
