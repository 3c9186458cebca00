"""Reading checkpoint files safely and loading them strictly."""
