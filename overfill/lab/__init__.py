"""What measures a stack and what breaks it. Nothing that serves imports this package."""
