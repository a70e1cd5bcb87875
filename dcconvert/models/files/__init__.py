"""Files of trained models: what they hold, read without running any code in them, and which weights to take."""
