"""What is trained: each method is a loss and what happens after a step."""
