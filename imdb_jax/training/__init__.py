"""What runs only while training."""
