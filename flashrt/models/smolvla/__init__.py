"""SmolVLA: LeRobot's policy of cameras, an instruction and a state."""
