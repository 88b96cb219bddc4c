"""Rank 3: pi0.5, a policy of images, a task and a state written into it, as LeRobot stores it."""
