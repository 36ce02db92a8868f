"""What a trial shows of itself: signals, and the verdict on collapse."""
